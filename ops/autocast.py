"""Autocast rules of ops.

``torch.library.register_autocast`` fixes the dtype at registration. Here the dtype is read at each
call, because the user's autocast context may have another dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("slope_fx", "FRAGMENT")


def register_autocast(op: Any, arguments: Callable[..., tuple[Any, ...]]) -> None:
    """Register the autocast rule of ``op`` for CPU and CUDA.

    Args:
        op: an overload of a custom op.
        arguments: maps the autocast dtype and the arguments of the op to its new arguments.
    """
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _register(op, arguments, device_type, key)


def _register(
    op: Any, arguments: Callable[..., tuple[Any, ...]], device_type: str, key: str
) -> None:
    autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def called(*args: Any, **kwargs: Any) -> Tensor:
        chosen = arguments(torch.get_autocast_dtype(device_type), *args, **kwargs)
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            result: Tensor = op(*chosen)
            return result

    _LIBRARY.impl(op._schema.name.removeprefix("slope_fx::"), called, key)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a floating tensor except float64, as torch's autocast does."""
    castable = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if castable else tensor
