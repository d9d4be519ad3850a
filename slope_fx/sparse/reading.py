"""What ``layer.weight`` of a sparse layer is in eager code: a tensor to which no write is lost.

The dense ``W^R`` is made at each reading, so a write to it would vanish. Each write to a
:class:`DenseWeight`, or to a view of one, by whatever road, is carried out on the kept values or
refused:

- an initialisation (``torch.nn.init``, ``reset_parameters``, a fill with one number or with random
  ones) is projected on the mask, as it is for a weight that is pruned afterwards;
- any other write is carried out if it leaves the pruned elements zero, so that nothing of it is
  lost. Otherwise it is refused, and the weight stays as it was.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from slope_fx.errors import UnsupportedError

_TENSOR: Any = Tensor
_FILLS = {
    "bernoulli_", "cauchy_", "exponential_", "fill_", "geometric_", "log_normal_", "normal_",
    "random_", "uniform_", "zero_",
}  # fmt: skip
_DETACHED = ("set_", "resize_", "resize_as_", "as_strided_", "share_memory_", "__dlpack__")
"""What would give it another memory, or hand out its own. PyTorch lets no subclass know of some."""
_GET_DATA, _SET_DATA = _TENSOR.data.__get__, _TENSOR.data.__set__
_GET_IS_LEAF, _SET_GRAD = _TENSOR.is_leaf.__get__, _TENSOR.grad.__set__
_SET_REQUIRES_GRAD = _TENSOR.requires_grad.__set__
_OF_THE_PARAMETER = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook"}


class Read(Protocol):
    """What is read: the part of :class:`~slope_fx.SparseWeight` that writes are carried out on."""

    name: str
    _values_name: str

    @property
    def adapter_active(self) -> bool: ...

    @property
    def values(self) -> nn.Parameter: ...

    def expanded(self) -> Tensor: ...

    def has_pruned(self, matrix: Tensor) -> bool: ...

    def store(self, matrix: Tensor) -> None: ...


@dataclass
class _Reading:
    """One reading of a weight.

    Attributes:
        weight: what was read.
        dense: the tensor that was made, (stack * d_out, d_in): all views share its memory.
        stamp: of the values, when they were read.
    """

    weight: Read
    dense: Tensor
    stamp: tuple[int, ...]

    def refuse(self, what: str, instead: str = "") -> NoReturn:
        """Raise, with the temporary as it was read."""
        name = self.weight.name
        raise UnsupportedError(
            f"{name}: {what}. `weight` of a sparse layer is made from its values at each reading. "
            + (
                instead
                or "To write a dense weight and drop its pruned elements, call "
                f"slope_fx.sparse_weights(model)[{name!r}].write_(dense)."
            )
        )

    def written(self, what: str, *, initialises: bool, in_grad_mode: bool) -> None:
        """Carry a write to the temporary out on the values, or put it back and refuse."""
        weight = self.weight
        now = _stamp(weight)
        reason = instead = ""
        if in_grad_mode:
            reason = f"{what} writes to it while gradients are on"
            instead = "Write under torch.no_grad(), as to any parameter."
        elif now != self.stamp:
            reason = f"{what} writes to a reading from before its values changed"
            instead = "Read `weight` again."
        elif weight.adapter_active:
            reason = f"{what} writes to it while its adapter takes part, which `weight` includes"
        elif not initialises and weight.has_pruned(self.dense):
            reason = f"{what} gives numbers to elements that are pruned, which would be lost"
            if what == "`data`" or "add" in what:
                instead = (
                    "Keep the update apart, as an adapter, or make the model dense first: "
                    "slope_fx.densify(model). To drop the pruned elements, call "
                    f"slope_fx.sparse_weights(model)[{weight.name!r}].write_(dense)."
                )
        if reason:
            with torch.no_grad():
                self.dense.copy_(weight.expanded())
            self.refuse(reason, instead)
        weight.store(self.dense)
        self.stamp = _stamp(weight)
        if initialises:
            with torch.no_grad():
                self.dense.copy_(weight.expanded())


class DenseWeight(Tensor):
    """The dense ``W^R`` of a sparse layer, (d_out, d_in) or as the layer has it.

    Reads are those of any tensor; autograd brings gradients back compressed.

    Raises:
        UnsupportedError: at a write that can't be carried out on the values.
    """

    _reading: _Reading
    _direct: bool

    @staticmethod
    def of(weight: Read, dense: Tensor, shaped: Tensor) -> "DenseWeight":
        """A reading of ``weight``: ``dense`` as ``shaped``, a view of it."""
        return _wrap(shaped, _Reading(weight, dense, _stamp(weight)), direct=True)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.compiler.is_compiling():
            # Compiled code wouldn't tell of its writes, and takes no such subclass anyway.
            raise UnsupportedError(
                "`weight` of a sparse layer was read in eager code and given to a compiled "
                "function. Read it inside of that, or give it a copy: layer.weight.clone()."
            )
        with torch._C.DisableTorchFunctionSubclass():
            readings = _readings((args, kwargs))
            if not readings:
                return func(*args, **kwargs)
            handled = _special(func, name, args)
            if handled is not None:
                return handled[0]
            before = [reading.dense._version for reading in readings]
            alone = args and isinstance(args[0], DenseWeight) and args[0].requires_grad
            try:
                if func == _SET_DATA:
                    result: Any = None
                    _assign(args[0], args[1])
                else:
                    result = func(*args, **kwargs)
            finally:
                for reading, version in zip(readings, before, strict=True):
                    if reading.dense._version != version:
                        reading.written(
                            "`data`" if func == _SET_DATA else f"{name}()",
                            initialises=_initialises(func, name),
                            in_grad_mode=bool(alone) and torch.is_grad_enabled()
                            and func != _SET_DATA,
                        )  # fmt: skip
            if name in ("numpy", "__array__"):
                result.setflags(write=False)  # its memory is the temporary's
                return result
            return tree_map(lambda part: _view(part, readings), result)


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(self: DenseWeight, *args: Any, **kwargs: Any) -> NoReturn:
        self._reading.refuse(f"{name}() is not possible")

    return refuse


for _name in _DETACHED:
    setattr(DenseWeight, _name, _refused(_name))


def _special(func: Callable[..., Any], name: str, args: tuple[Any, ...]) -> tuple[Any] | None:
    """The result of what isn't an operation on elements, in a tuple; None for anything else."""
    it = args[0] if args and isinstance(args[0], DenseWeight) else None
    if it is None:
        return None
    reading = it._reading
    if func == _GET_DATA:
        return (_wrap(it.detach(), reading),)  # which counts its writes, as .data doesn't
    if not it._direct:
        return None
    values = reading.weight._values_name
    if func == _SET_REQUIRES_GRAD or name == "requires_grad_":
        reading.weight.values.requires_grad_(args[1] if len(args) > 1 else True)
        return (it,)
    if func == _SET_GRAD:
        reading.refuse("its gradient can't be set", f"Set that of `{values}`, which is compressed.")
    if name in _OF_THE_PARAMETER:
        reading.refuse(
            f"{name}() would see nothing of a compiled model", f"Call it on the layer's `{values}`."
        )
    if func == _GET_IS_LEAF and _called_from("torch.optim.optimizer", 3):
        reading.refuse(
            "an optimizer can't train it", f"Give it model.parameters(), or the layer's `{values}`."
        )
    return None


def _assign(it: DenseWeight, data: Any) -> None:
    """``it.data = data``, as a write to the temporary."""
    if not isinstance(data, Tensor) or data.shape != it.shape or data.dtype != it.dtype:
        got = (
            f"{tuple(data.shape)} {data.dtype}" if isinstance(data, Tensor) else type(data).__name__
        )
        it._reading.refuse(
            f"`data` was set to {got}, where the weight is {tuple(it.shape)} {it.dtype}"
        )
    it.detach().copy_(data)


def _readings(arguments: Any) -> list[_Reading]:
    found: dict[int, _Reading] = {}
    for leaf in tree_leaves(arguments):
        reading = getattr(leaf, "_reading", None) if isinstance(leaf, DenseWeight) else None
        if reading is not None:
            found[id(reading)] = reading
    return list(found.values())


def _view(part: Any, readings: list[_Reading]) -> Any:
    """A result, wrapped if it shares the memory of a reading."""
    if not isinstance(part, Tensor) or isinstance(part, DenseWeight):
        return part
    for reading in readings:
        if _shares(part, reading.dense):
            return _wrap(part, reading)
    return part


def _shares(part: Tensor, dense: Tensor) -> bool:
    try:
        return part.untyped_storage()._cdata == dense.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # of functorch's tensors, sparse ones
        return False


def _wrap(tensor: Tensor, reading: _Reading, *, direct: bool = False) -> DenseWeight:
    wrapped = tensor.as_subclass(DenseWeight)
    wrapped._reading, wrapped._direct = reading, direct
    return wrapped


_steps = 0


def note_step() -> None:
    """Note that an optimizer stepped. Some write without changing a tensor's version."""
    global _steps
    _steps += 1


def _stamp(weight: Read) -> tuple[int, ...]:
    values = weight.values
    return values.data_ptr(), (0 if values.is_inference() else values._version), _steps


def _initialises(func: Callable[..., Any], name: str) -> bool:
    return (
        name in _FILLS
        or getattr(func, "__module__", "") == "torch.nn.init"
        or _called_from("torch.nn.init", 3)
    )


def _called_from(module: str, up: int) -> bool:
    """Whether one of the nearest frames outside of this file is of a module."""
    frame: FrameType | None = sys._getframe(up)
    for _ in range(3):
        if frame is not None:
            if frame.f_globals.get("__name__") == module:
                return True
            frame = frame.f_back
    return False
