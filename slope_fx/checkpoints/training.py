"""The rest of a training run beside the weights: optimizers, schedules, random states.

State dicts are trees of mappings, lists, numbers and tensors. The tensors go into
``training.safetensors``, the tree with their names in their places into ``training.json``; so
nothing is unpickled when it is read.
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
    """``training`` and the random states as a tree for JSON, and the tensors that it names.

    A collective, where states are sharded.

    Raises:
        CheckpointError: something in it can't be stored without pickle.
    """
    if not isinstance(training, Mapping) or not all(isinstance(k, str) for k in training):
        raise CheckpointError(
            "training must map names to what has a state_dict, or to plain data, such as "
            '{"optimizer": optimizer, "schedule": schedule, "step": step}.'
        )
    if _RANDOM in training:
        raise CheckpointError(f"training has {_RANDOM!r}, which is kept by itself.")
    tensors: dict[str, Tensor] = {}
    states = {name: _state_of(part) for name, part in training.items()}
    tree = {name: _encode(state, name, tensors) for name, state in states.items()}
    tree[_RANDOM] = _encode(_random_states(), _RANDOM, tensors)
    return tree, tensors


def write_training(folder: Path, tree: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write what :func:`collect_training` gave into ``folder``."""
    (folder / TREE).write_text(json.dumps(tree))
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def load_training(
    path: str | os.PathLike[str],
    training: Mapping[str, Any] | None = None,
    *,
    random_states: bool = True,
    verify: bool = True,
) -> dict[str, Any]:
    """Put a run's optimizers, schedules and random states back as ``save_pretrained`` found them.

    Args:
        path: the checkpoint.
        training: by the names that they were saved under, the objects to load: each has a
            ``load_state_dict``. Make them as for a new run, over the loaded model.
        random_states: whether to set those of torch, Python and NumPy too. The run goes on
            exactly where it was if this is the last thing before the loop.
        verify: check the files' hashes.

    Returns:
        All else that was saved, by name: plain data, and state dicts of what isn't in
        ``training``.

    Raises:
        CheckpointError: the checkpoint has no such state, isn't whole, or ``training`` names
            something that wasn't saved.
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
    """Load all of the parts; if one refuses, the others are as they were."""
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
                f"training[{name!r}], a {type(part).__name__}, can't take the state that was "
                f"saved: {first_line(error)} Make it as the interrupted run did."
            ) from error


def _state_of(part: Any) -> Any:
    has_state = hasattr(part, "state_dict") and not isinstance(part, type)
    return part.state_dict() if has_state else part


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON, its tensors put into ``tensors``, under names that the JSON has."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = _plain_tensor(value, where)
        return {"tensor": name}
    if isinstance(value, enum.Enum):
        pass  # which would come back as something else
    elif value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str(value)
    elif isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)  # NumPy's too
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
