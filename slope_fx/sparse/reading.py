"""The tensor that ``layer.weight`` of a sparse layer returns in eager code.

Each read rebuilds the dense ``W^R`` as a temporary tensor, so a plain write to it would be lost.
A :class:`DenseWeight` detects writes to the temporary and to its views. It applies them to the
values or refuses them:

- An initialization (``torch.nn.init``, ``reset_parameters``, a fill with a constant or with random
  numbers) is applied, and its pruned elements are dropped.
- Any other write is applied if all pruned elements are zero after it. Otherwise it raises an
  error, and the weight is unchanged.

The reading of a sharded weight is a :class:`ShardedDenseWeight`, a DTensor, and does the same. A
write to it is a collective operation.

A weight without content, of a model that was compiled on the meta device, gets its content by
writes (see ``blank.py``).
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from slope_fx.errors import UnsupportedError
from slope_fx.ops.dispatch import local
from slope_fx.passes.views import Layout
from slope_fx.sparse.blank import check_filled
from slope_fx.sparse.written import Read, Reading, stamp_of

_TENSOR: Any = Tensor
_FILLS = {
    "bernoulli_", "cauchy_", "exponential_", "fill_", "geometric_", "log_normal_", "normal_",
    "random_", "uniform_", "zero_",
}  # fmt: skip
_DETACHED = ("set_", "resize_", "resize_as_", "as_strided_", "share_memory_", "__dlpack__")
"""Methods that replace or expose the memory. ``__torch_function__`` does not see some of them."""
_GET_DATA, _SET_DATA = _TENSOR.data.__get__, _TENSOR.data.__set__
_GET_IS_LEAF, _SET_GRAD = _TENSOR.is_leaf.__get__, _TENSOR.grad.__set__
_SET_REQUIRES_GRAD = _TENSOR.requires_grad.__set__
_OF_THE_PARAMETER = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook"}


class DenseWeight(Tensor):
    """The dense ``W^R`` of a sparse layer, in the shape of the layer's dense parameter.

    It can be read as any tensor. Autograd returns compressed gradients to the values.

    Raises:
        UnsupportedError: at a write that cannot be applied to the values.
    """

    _reading: Reading
    _direct: bool

    @staticmethod
    def of(weight: Read, dense: Tensor, shaped: Tensor, layout: Layout | None = None) -> Any:
        """Returns a reading of ``weight``.

        Args:
            weight: the sparse weight.
            dense: the temporary tensor (stack * d_out, d_in).
            shaped: a view of ``dense`` in the shape of the layer's parameter.
            layout: if it is given, ``dense`` is ``shaped``.
        """
        return _wrap(shaped, Reading(weight, dense, stamp_of(weight), layout), direct=True)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _handled(func, args, kwargs or {})

    @property
    def _is_hf_initialized(self) -> bool:
        # transformers marks parameters that it loaded, so that it doesn't initialize them.
        return getattr(self._reading.weight.values, "_is_hf_initialized", False)


class ShardedDenseWeight(DTensor):
    """A :class:`DenseWeight` of a sharded weight: a DTensor with the placements of the values."""

    _reading: Reading
    _direct: bool

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _handled(func, args, kwargs or {})


class _AsSharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> ShardedDenseWeight:
        inner = tensor._local_tensor
        made: Any = ShardedDenseWeight
        result: ShardedDenseWeight = made(
            inner.view_as(inner), tensor._spec, requires_grad=tensor.requires_grad
        )
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


_READINGS = (DenseWeight, ShardedDenseWeight)


def _handled(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a function of torch with readings among its arguments."""
    name = getattr(func, "__name__", "")
    if torch.compiler.is_compiling():
        # Compiled code would not report its writes, and does not support this subclass.
        raise UnsupportedError(
            "`weight` of a sparse layer was read in eager code and given to a compiled "
            "function. Read it inside the function, or pass a copy: layer.weight.clone()."
        )
    with torch._C.DisableTorchFunctionSubclass():
        leaves = [
            leaf
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, _READINGS) and getattr(leaf, "_reading", None) is not None
        ]
        readings = _readings(leaves)
        if not readings:
            return func(*args, **kwargs)
        handled = _special(func, name, args)
        if handled is not None:
            return handled[0]
        initialises = _initialises(func, name)
        for reading in readings:
            if reading.unpruned and not initialises:
                reading.renew()
        before = [leaf._version for leaf in leaves]
        alone = args and isinstance(args[0], _READINGS) and args[0].requires_grad
        try:
            if func == _SET_DATA:
                result: Any = None
                _assign(args[0], args[1])
            else:
                result = func(*args, **kwargs)
        finally:
            versions = zip(leaves, before, strict=True)
            for reading in _readings([leaf for leaf, old in versions if leaf._version != old]):
                reading.written(
                    "`data`" if func == _SET_DATA else f"{name}()",
                    initialises=initialises,
                    in_grad_mode=bool(alone) and torch.is_grad_enabled() and func != _SET_DATA,
                )
        if not initialises:
            _check_use(name, result, readings)
        if name in ("numpy", "__array__"):
            result.setflags(write=False)  # NumPy would write to the temporary
            return result
        return tree_map(lambda part: _view(part, readings), result)


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        reading: Reading = self._reading
        reading.refuse(f"{name}() is not possible")

    return refuse


for _class in _READINGS:
    for _name in _DETACHED:
        setattr(_class, _name, _refused(_name))


def _special(func: Callable[..., Any], name: str, args: tuple[Any, ...]) -> tuple[Any] | None:
    """The result, in a tuple, of an operation on attributes; None for other operations."""
    it = args[0] if args and isinstance(args[0], _READINGS) else None
    if it is None:
        return None
    reading = it._reading
    if func == _GET_DATA:
        return (_wrap(it.detach(), reading),)  # a write to .data would not change the version
    if not it._direct:
        return None
    values = reading.weight._values_name
    if func == _SET_REQUIRES_GRAD or name == "requires_grad_":
        reading.weight.values.requires_grad_(args[1] if len(args) > 1 else True)
        return (it,)
    if func == _SET_GRAD:
        reading.refuse(
            "its gradient can't be set", f"Set the gradient of `{values}`, which is compressed."
        )
    if name in _OF_THE_PARAMETER:
        reading.refuse(
            f"{name}() has no effect in a compiled model", f"Call it on the layer's `{values}`."
        )
    if func == _GET_IS_LEAF and _called_from("torch.optim.optimizer", 4):
        reading.refuse(
            "an optimizer can't train it", f"Give it model.parameters(), or the layer's `{values}`."
        )
    return None


def _assign(it: Any, data: Any) -> None:
    """Apply ``it.data = data`` as a write to the temporary."""
    if not isinstance(data, Tensor) or data.shape != it.shape or data.dtype != it.dtype:
        got = (
            f"{tuple(data.shape)} {data.dtype}" if isinstance(data, Tensor) else type(data).__name__
        )
        it._reading.refuse(
            f"`data` was set to {got}, where the weight is {tuple(it.shape)} {it.dtype}"
        )
    it.detach().copy_(data)


def _check_use(name: str, result: Any, readings: list[Reading]) -> None:
    """Check that weights have content from which a tensor was computed.

    Raises:
        StateError: one has none.
    """
    if name.startswith("new_") or name.endswith("_like"):
        return  # memory for an initialization
    for reading in readings:
        start = reading.weight.start
        if start is None or start.written:
            continue
        if any(
            isinstance(t, Tensor) and not _shares(t, reading.dense) for t in tree_leaves(result)
        ):
            check_filled(reading.weight)


def _readings(leaves: list[Any]) -> list[Reading]:
    """The readings of tensors, each once."""
    return list({id(leaf._reading): leaf._reading for leaf in leaves}.values())


def _view(part: Any, readings: list[Reading]) -> Any:
    """A result, wrapped as a reading if it shares memory with one."""
    if not isinstance(part, Tensor) or isinstance(part, _READINGS):
        return part
    for reading in readings:
        if _shares(part, reading.dense):
            return _wrap(part, reading)
    return part


def _shares(part: Tensor, dense: Tensor) -> bool:
    try:
        mine, other = local(part).untyped_storage(), local(dense).untyped_storage()
        return mine._cdata == other._cdata
    except (RuntimeError, NotImplementedError):  # functorch and sparse tensors have no storage
        return False


def _wrap(tensor: Tensor, reading: Reading, *, direct: bool = False) -> Any:
    as_sharded: Any = _AsSharded.apply
    sharded = isinstance(tensor, DTensor)
    wrapped = as_sharded(tensor) if sharded else tensor.as_subclass(DenseWeight)
    wrapped._reading, wrapped._direct = reading, direct
    return wrapped


def _initialises(func: Callable[..., Any], name: str) -> bool:
    return (
        name in _FILLS
        or getattr(func, "__module__", "") == "torch.nn.init"
        or _called_from("torch.nn.init", 4)
    )


def _called_from(module: str, up: int) -> bool:
    """Whether one of the three frames from ``up`` on belongs to the module ``module``."""
    frame: FrameType | None = sys._getframe(up)
    for _ in range(3):
        if frame is not None:
            if frame.f_globals.get("__name__") == module:
                return True
            frame = frame.f_back
    return False
