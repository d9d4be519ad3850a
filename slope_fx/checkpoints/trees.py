"""State dicts as JSON, with the names of their tensors in the tensors' places."""

import enum
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from slope_fx.errors import CheckpointError

_MAPPINGS: dict[type, str] = {dict: "items", OrderedDict: "ordered", Counter: "counter"}
_MAKE: dict[str, Any] = {
    "list": list, "tuple": tuple, "items": dict, "ordered": OrderedDict,
    "counter": lambda items: Counter(dict(items)),
}  # fmt: skip
TENSOR, SHARDED = "tensor", "sharded"


def encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON with the names of its tensors.

    Args:
        value: numbers, strings, tensors, lists, tuples and mappings.
        where: its name in error messages.
        tensors: receives the tensors, as they are.

    Raises:
        CheckpointError: an object in ``value`` cannot be stored without pickle.
    """
    if isinstance(value, Tensor):
        _check_plain(value, where)
        name = str(len(tensors))
        tensors[name] = value.detach()
        return {SHARDED if isinstance(value, DTensor) else TENSOR: name}
    if isinstance(value, enum.Enum):
        pass  # an enum would be loaded as its plain value
    elif value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str(value)
    elif isinstance(value, (int, float)):
        # NumPy scalars become Python numbers.
        return int(value) if isinstance(value, int) else float(value)
    elif hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return encode(value.item(), where, tensors)
    elif type(value) in (list, tuple):
        inner = [encode(v, f"{where}.{i}", tensors) for i, v in enumerate(value)]
        return {type(value).__name__: inner}
    elif type(value) in _MAPPINGS:
        items = [[_key(k, where), encode(v, f"{where}.{k}", tensors)] for k, v in value.items()]
        return {_MAPPINGS[type(value)]: items}
    raise CheckpointError(
        f"training: {where} is a {type(value).__name__}, which can't be stored without pickle. "
        "Allowed are numbers, strings, tensors, lists, tuples, dicts, and None."
    )


def decode(node: Any, read: Callable[[str, str], Any]) -> Any:
    """The value of a node.

    Args:
        node: the result of :func:`encode`.
        read: maps the kind, :data:`TENSOR` or :data:`SHARDED`, and the name of a tensor to what
            stands in its place.
    """
    if not isinstance(node, dict):
        return node
    ((kind, inner),) = node.items()
    if kind in (TENSOR, SHARDED):
        return read(kind, inner)
    if kind in ("list", "tuple"):
        return _MAKE[kind](decode(value, read) for value in inner)
    return _MAKE[kind]([(key, decode(value, read)) for key, value in inner])


def replace_leaves(value: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """A copy of a state in which ``by`` replaces each object of a class."""
    if isinstance(value, kind):
        return by(value)
    if type(value) in (list, tuple):
        return type(value)(replace_leaves(v, kind, by) for v in value)
    if type(value) in _MAPPINGS:
        made = type(value)()
        made.update({k: replace_leaves(v, kind, by) for k, v in value.items()})
        return made
    return value


def _check_plain(value: Tensor, where: str) -> None:
    tensor = value.to_local() if isinstance(value, DTensor) else value
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(
            f"training: {where} is a {type(tensor).__name__} ({tensor.layout}, {tensor.device}) of "
            "a kind that safetensors can't hold. Keep that optimizer's state with torch.save."
        )


def _key(key: Any, where: str) -> Any:
    if type(key) not in (str, int, float, bool):
        raise CheckpointError(f"training: {where} has the key {key!r}; keys are str or numbers.")
    return key


def encode_inline(value: Any, where: str) -> Any:
    """``value`` as JSON with its tensors in it, for small ones.

    Raises:
        CheckpointError: an object in ``value`` cannot be stored without pickle.
    """
    tensors: dict[str, Tensor] = {}
    tree = encode(value, where, tensors)
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        raise CheckpointError(f"{where} holds sharded tensors. Save it beside the TrainingState.")
    return {
        "tree": tree,
        "tensors": {
            name: [str(t.dtype).removeprefix("torch."), list(t.shape), _bytes_of(t).hex()]
            for name, t in tensors.items()
        },
    }


def decode_inline(data: Any) -> Any:
    """The value of :func:`encode_inline`."""

    def read(_: str, name: str) -> Tensor:
        dtype, shape, text = data["tensors"][name]
        content = bytearray.fromhex(text)
        if not content:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        return torch.frombuffer(content, dtype=getattr(torch, dtype)).view(shape).clone()

    return decode(data["tree"], read)


def _bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.cpu().contiguous().view(-1).view(torch.uint8).tolist())
