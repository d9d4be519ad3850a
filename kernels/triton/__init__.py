"""The Triton engine: N:M products, masks and conversions on NVIDIA GPUs.

``launch.py`` launches the kernels on tensors. The kernels are in ``masks.py`` (both masks),
``weights.py`` (expand and compress), ``linear.py`` (the product and the input gradient),
``weight_grad.py`` and ``reduce.py``. ``tiles.py`` has the functions that they share. ``configs.py``
lists the tile sizes of each kernel, and ``tuning.py`` measures the fastest.

The engine supports fp32, bf16 and fp16 and sums in fp32. The values of a weight can be fp32 with
16-bit inputs, as under autocast. fp32 operands are multiplied in three TF32 products, which are at
most about three bits less exact than fp32, or in one, if PyTorch allows TF32
(``launch._precision``). Sums over split columns or tokens are added in a fixed order, so that
results repeat bit for bit.

The ops that call this engine are opaque to Inductor, and are no ``triton_op``. Inductor fuses
nothing into the kernel of a user, and it would fix tile sizes and the engine when it compiles; here
they are measured for the number of tokens. A launch uses only the current stream, so CUDA graphs
(``mode="reduce-overhead"``) can capture the ops.

Triton is imported with the first launch. A machine without a GPU does not need it.
"""

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from slope_fx.kernels.engine import Engine
from slope_fx.kernels.triton.configs import FEW

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)
"""The first compute capability whose tensor cores support bf16."""


class Triton(Engine):
    """The engine in Triton."""

    name = "triton"
    devices = ("cuda",)
    takes_wider_values = True

    def unavailable(self) -> str:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if interpreted():
            return ""
        if torch.version.hip is not None:
            return "it is for NVIDIA GPUs, and this PyTorch is for AMD GPUs"
        return "" if torch.cuda.is_available() else "there is no CUDA device"

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str:
        if device.type != "cuda" and not (interpreted() and device.type == "cpu"):
            return f"it computes on NVIDIA GPUs, not on {device}"
        if dtype not in _DTYPES:
            return f"it has no kernels for {dtype}"
        return self.unavailable() or ("" if device.type == "cpu" else _too_old(device))

    @property
    def _launch(self) -> ModuleType:
        from slope_fx.kernels.triton import launch

        return launch

    def magnitude_mask(self, weight: Tensor, n: int, m: int) -> Tensor:
        return self._launch.magnitude_mask(weight, n, m)

    def backward_mask(self, values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        return self._launch.backward_mask(values, forward_mask, n, m)

    def expand(self, values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        return self._launch.expand(values, forward_mask, n, m)

    def expand_twice_pruned(
        self, values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
    ) -> Tensor:
        return self._launch.expand_twice_pruned(values, forward_mask, backward_mask, n, m)

    def compress(self, dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        return self._launch.compress(dense, forward_mask, n, m)

    def sparse_linear(
        self,
        x: Tensor,
        values: Tensor,
        forward_mask: Tensor,
        bias: Tensor | None,
        n: int,
        m: int,
        training: bool = False,
    ) -> Tensor:
        return self._launch.sparse_linear(x, values, forward_mask, bias, n, m)

    def expand_quantised(
        self,
        codes: Tensor,
        scales: Tensor,
        forward_mask: Tensor,
        n: int,
        m: int,
        group: int,
        d_in: int,
        dtype: torch.dtype,
    ) -> Tensor:
        return self._launch.expand_quantised(codes, scales, forward_mask, n, m, group, d_in, dtype)

    def quantised_linear(
        self,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        forward_mask: Tensor,
        bias: Tensor | None,
        n: int,
        m: int,
        group: int,
    ) -> Tensor:
        """As :meth:`Engine.quantised_linear`. More than 64 tokens are a dense product."""
        weight = (codes, scales, forward_mask, bias, n, m, group)
        if x.numel() > FEW * x.shape[-1]:
            return super().quantised_linear(x, *weight)
        return self._launch.quantised_linear(x, *weight)

    def sparse_input_grad(
        self,
        grad: Tensor,
        values: Tensor,
        forward_mask: Tensor,
        backward_mask: Tensor,
        n: int,
        m: int,
    ) -> Tensor:
        return self._launch.sparse_input_grad(grad, values, forward_mask, backward_mask, n, m)

    def sparse_weight_grad(
        self,
        grad: Tensor,
        x: Tensor,
        forward_mask: Tensor,
        n: int,
        m: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As :meth:`Engine.sparse_weight_grad`; in fp32 the sums are not rounded."""
        return self._launch.sparse_weight_grad(grad, x, forward_mask, n, m, dtype)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on CPU tensors. It is slow, and for tests."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes", "y")


@functools.cache
def _too_old(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    if capability >= _OLDEST:
        return ""
    return "{} has compute capability {}.{}, and the kernels need {}.{}".format(
        device, *capability, *_OLDEST
    )
