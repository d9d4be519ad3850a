"""The random states of torch, Python and NumPy, as plain data."""

import random
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slope_fx.errors import TrainingWarning, users_stacklevel


def random_states() -> dict[str, Any]:
    """The random states of this process."""
    states: dict[str, Any] = {"torch": _text(torch.get_rng_state()), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = [_text(state) for state in torch.cuda.get_rng_state_all()]
    numpy = _numpy()
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = (name, keys.tolist(), *rest)
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore the result of :func:`random_states`."""
    torch.set_rng_state(_state(states["torch"]))
    random.setstate(states["python"])
    saved, here = len(states.get("cuda", ())), torch.cuda.device_count()
    if saved == here:
        torch.cuda.set_rng_state_all([_state(state) for state in states.get("cuda", ())])
    else:
        _warn(
            f"The checkpoint has the random states of {saved} CUDA devices, and this process sees "
            f"{here}. They keep the states that they have now. Make as many visible as then, or "
            "give each a seed with torch.cuda.manual_seed_all."
        )
    numpy = _numpy()
    if "numpy" in states and numpy is not None:
        name, keys, *rest = states["numpy"]
        keys = keys.tolist() if isinstance(keys, Tensor) else keys  # a tensor before format 3
        numpy.random.set_state((name, numpy.array(keys, dtype="uint32"), *rest))


def tell_of_new_rank(rank: int, saved: int) -> None:
    """Warn that a rank has no saved random states, and keeps its own."""
    _warn(
        f"The checkpoint has the random states of {saved} ranks. Rank {rank} has none in it and "
        "keeps those that it has now. Give each rank a seed of its own if the data or dropout "
        "depend on it."
    )


def _warn(message: str) -> None:
    warnings.warn(message, TrainingWarning, stacklevel=users_stacklevel())


def _text(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _state(text: Any) -> Tensor:
    if isinstance(text, Tensor):  # before format 3
        return text
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _numpy() -> Any:
    try:
        import numpy
    except ImportError:
        return None
    return numpy
