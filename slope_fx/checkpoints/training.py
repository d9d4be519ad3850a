"""Save and load the training state: optimizers, schedules and random states.

State dicts are trees of mappings, lists, numbers and tensors. ``training.safetensors`` stores the
tensors. ``training.json`` stores the tree, with the names of the tensors in their places. Loading
therefore unpickles nothing.
"""

import contextlib
import copy
import enum
import json
import os
import random
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slope_fx.checkpoints.manifest import check_files, read_manifest
from slope_fx.errors import CheckpointError, SlopeError, first_line
from slope_fx.sparse.weight import whole

TREE, TENSORS = "training.json", "training.safetensors"
_RANDOM = "random_states"


def collect_training(training: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``training`` and the random states as a JSON tree, and the tensors that the tree names.

    This is a collective operation if states are sharded.

    Raises:
        CheckpointError: an object in ``training`` cannot be stored without pickle.
    """
    if not isinstance(training, Mapping) or not all(isinstance(k, str) for k in training):
        raise CheckpointError(
            "training must map names to objects with a state_dict, or to plain data, such as "
            '{"optimizer": optimizer, "schedule": schedule, "step": step}.'
        )
    if _RANDOM in training:
        raise CheckpointError(
            f"training has {_RANDOM!r}, a reserved name: random states are always saved."
        )
    tensors: dict[str, Tensor] = {}
    states = {name: _state_of(part) for name, part in training.items()}
    tree = {name: _encode(state, name, tensors) for name, state in states.items()}
    tree[_RANDOM] = _encode(_random_states(), _RANDOM, tensors)
    return tree, tensors


def write_training(folder: Path, tree: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the result of :func:`collect_training` into ``folder``."""
    (folder / TREE).write_text(json.dumps(tree))
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def load_training(
    path: str | os.PathLike[str],
    training: Mapping[str, Any] | None = None,
    *,
    random_states: bool = True,
    verify: bool = True,
) -> dict[str, Any]:
    """Restore the optimizers, schedules and random states that ``save_pretrained`` saved.

    Args:
        path: folder of the checkpoint.
        training: the objects to load, by the names under which they were saved. Each has a
            ``load_state_dict`` method. Make them as for a new run, with the loaded model.
        random_states: whether to set the random states of torch, Python and NumPy. To continue
            the run exactly, make this call the last one before the training loop.
        verify: whether to check the hashes of the files.

    Returns:
        The remaining saved state by name: plain data, and the state dicts of objects that are not
        in ``training``.

    Raises:
        CheckpointError: the checkpoint has no training state or is damaged, ``training`` names an
            object that was not saved, or an object refuses its state.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if TREE not in manifest.files:
        raise CheckpointError(
            f"{folder} has no training state: it was saved without training=. Only the model can "
            "be loaded from it."
        )
    check_files(folder, manifest, hashes=verify)
    try:
        tree = json.loads((folder / TREE).read_text())
        tensors = load_file(folder / TENSORS)
        states = {name: _decode(node, tensors) for name, node in tree.items()}
        randoms = states.pop(_RANDOM)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder / TREE} is damaged: {error!r:.200}.") from None
    training = {} if training is None else training
    if not isinstance(training, Mapping):
        raise CheckpointError(f"training is a {type(training).__name__}; it maps names to objects.")
    for name, part in training.items():
        if name not in states:
            raise CheckpointError(
                f"training has {name!r}, but {folder} was saved with {sorted(states)}."
            )
        if not hasattr(part, "load_state_dict"):
            raise CheckpointError(
                f"training[{name!r}] is a {type(part).__name__}, which has no load_state_dict. "
                "Plain data need not be named: it is returned."
            )
    _load(training, states)
    if random_states:
        _set_random_states(randoms)
    return {name: state for name, state in states.items() if name not in training}


def _load(training: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Load the state of all objects. If one object refuses its state, all are restored."""
    before = {name: copy.deepcopy(part.state_dict()) for name, part in training.items()}
    for i, (name, part) in enumerate(training.items()):
        try:
            part.load_state_dict(states[name])
        except Exception as error:
            for other in list(training)[: i + 1]:
                with contextlib.suppress(Exception):
                    training[other].load_state_dict(before[other])
            if isinstance(error, SlopeError):
                raise
            raise CheckpointError(
                f"training[{name!r}], a {type(part).__name__}, can't load the state that was "
                f"saved: {first_line(error)} Make it as the interrupted run did."
            ) from error


def _state_of(part: Any) -> Any:
    has_state = hasattr(part, "state_dict") and not isinstance(part, type)
    return part.state_dict() if has_state else part


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON with the names of its tensors, which are added to ``tensors``."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = _plain_tensor(value, where)
        return {"tensor": name}
    if isinstance(value, enum.Enum):
        pass  # an enum would be loaded as its plain value
    elif value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str(value)
    elif isinstance(value, (int, float)):
        # NumPy scalars become Python numbers.
        return int(value) if isinstance(value, int) else float(value)
    elif hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _encode(value.item(), where, tensors)
    elif type(value) in (list, tuple):
        inner = [_encode(v, f"{where}.{i}", tensors) for i, v in enumerate(value)]
        return {type(value).__name__: inner}
    elif type(value) in _MAPPINGS:
        items = [[_key(k, where), _encode(v, f"{where}.{k}", tensors)] for k, v in value.items()]
        return {_MAPPINGS[type(value)]: items}
    raise CheckpointError(
        f"training: {where} is a {type(value).__name__}, which can't be stored without pickle. "
        "Allowed are numbers, strings, tensors, lists, tuples, dicts, and None."
    )


_MAPPINGS: dict[type, str] = {dict: "items", OrderedDict: "ordered", Counter: "counter"}
_MAKE: dict[str, Any] = {
    "list": list, "tuple": tuple, "items": dict, "ordered": OrderedDict,
    "counter": lambda items: Counter(dict(items)),
}  # fmt: skip


def _plain_tensor(value: Tensor, where: str) -> Tensor:
    tensor = whole(value.detach())
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(
            f"training: {where} is a {type(tensor).__name__} ({tensor.layout}, {tensor.device}) of "
            "a kind that safetensors can't hold. Keep that optimizer's state with torch.save."
        )
    return tensor.cpu().contiguous().clone()


def _key(key: Any, where: str) -> Any:
    if type(key) not in (str, int, float, bool):
        raise CheckpointError(f"training: {where} has the key {key!r}; keys are str or numbers.")
    return key


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, inner),) = node.items()
    if kind == "tensor":
        return tensors[inner]
    if kind in ("list", "tuple"):
        return _MAKE[kind](_decode(value, tensors) for value in inner)
    return _MAKE[kind]([(key, _decode(value, tensors)) for key, value in inner])


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    numpy = _numpy()
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = (name, torch.from_numpy(keys.astype("int64")), *rest)
    return states


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
    numpy = _numpy()
    if "numpy" in states and numpy is not None:
        name, keys, *rest = states["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))


def _numpy() -> Any:
    try:
        import numpy
    except ImportError:
        return None
    return numpy
