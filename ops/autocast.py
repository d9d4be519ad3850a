"""What autocast does with an op.

``torch.library.register_autocast`` fixes one dtype at registration; the user's autocast context
may name another, so the dtype is read at each call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("slope_fx", "FRAGMENT")


def register_autocast(op: Any, arguments: Callable[..., tuple[Any, ...]]) -> None:
    """Register what autocast makes of the arguments of ``op``, on every device.

    Args:
        op: an overload of a custom op.
        arguments: (dtype, the op's arguments) to the arguments that it is called with.
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
    """As torch's own autocast does: float64 is left alone."""
    castable = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if castable else tensor
