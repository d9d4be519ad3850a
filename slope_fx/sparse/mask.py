"""``Mask``: the parameter of a packed mask, which does not train."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slope_fx.errors import UnsupportedError

_ADVICE = (
    "Masks are bit-packed parameters without gradients, so that they are sharded and saved with "
    "the values. Take the parameters that train: [p for p in model.parameters() if "
    "p.requires_grad]."
)
_ARITHMETIC = (
    "norm", "pow", "square", "abs", "__pow__", "__mul__", "__rmul__", "mul", "mul_", "__imul__",
    "add_", "__iadd__", "sub_", "__isub__", "div_", "__itruediv__", "lerp", "lerp_", "addcmul_",
    "addcdiv_", "clamp_", "normal_", "uniform_",
)  # fmt: skip
"""Methods that norms, penalties, averages and optimizers call on parameters."""


class Mask(nn.Parameter):
    """A packed mask, uint8. Arithmetic on it raises an error.

    Setting ``requires_grad`` has no effect, so code may unfreeze all parameters of a model.

    Raises:
        UnsupportedError: at arithmetic, and if ``data`` is set to a tensor of another dtype or
            shape.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> "Mask":
        return super().__new__(cls, data, requires_grad=False)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass

    def requires_grad_(self, requires_grad: bool = True) -> "Mask":
        return self

    @property
    def data(self) -> Tensor:
        return _data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.dtype is not torch.uint8 or value.shape != self.shape:
            raise UnsupportedError(
                f"data of a mask {tuple(self.shape)} uint8 was set to {tuple(value.shape)} "
                f"{value.dtype}. {_ADVICE}"
            )
        _data.__set__(self, value)

    @property
    def _is_flat_param(self) -> bool:
        # FSDP1 reads this attribute of each parameter before its other checks.
        raise UnsupportedError(
            "FullyShardedDataParallel (FSDP1) makes one flat tensor of all parameters, which masks "
            "can't be part of. Use FSDP2: torch.distributed.fsdp.fully_shard(model)."
        )

    def type(self, *args: Any, **kwargs: Any) -> Any:
        # ZeroRedundancyOptimizer compares the types of all its parameters.
        if sys._getframe(2).f_globals.get("__name__") == _ZERO:
            raise UnsupportedError(f"ZeroRedundancyOptimizer can't hold masks. {_ADVICE}")
        return super().type(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Mask, (self.data,)


_data: Any = torch._C.TensorBase.data
_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


def fingerprint_of(bits: Tensor) -> int:
    """A number that differs for different masks: 64 bits of all bytes in their order."""
    if bits.is_meta:
        return 0
    words = torch.nn.functional.pad(bits.detach().flatten(), (0, -bits.numel() % 8))
    words = words.view(torch.int64)
    places = torch.arange(1, 2 * len(words), 2, device=bits.device)
    return int(((words ^ (words >> 29)) * places).sum())


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Mask, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError(f"{name} of a mask. {_ADVICE}")

    return refuse


for _name in _ARITHMETIC:
    setattr(Mask, _name, _refused(_name))


@contextmanager
def classes_kept(module: nn.Module) -> Iterator[None]:
    """Lets parameters that torch replaces in a ``with`` block have their classes, such as `Mask`.

    ``to_empty`` and ``load_state_dict(assign=True)`` make plain parameters.
    """
    before = {name: type(parameter) for name, parameter in module._parameters.items()}
    yield
    for name, parameter in module._parameters.items():
        kind = before.get(name)
        if type(parameter) is not nn.Parameter or isinstance(parameter.data, DTensor):
            continue
        if kind is not None and kind is not nn.Parameter and issubclass(kind, nn.Parameter):
            module._parameters[name] = kind(parameter.data)
