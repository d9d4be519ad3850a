"""The Triton engine: N:M products and what surrounds them, on NVIDIA GPUs.

``launch.py`` turns tensors into grids of programs; the kernels are in ``masks.py`` (the choice
of both masks), ``weights.py`` (expand, compress, the compressed transpose), ``linear.py`` (the
product and the input gradient), ``weight_grad.py``, ``low_rank.py`` (the adapter's update) and
``reduce.py``; what they share is in ``tiles.py``. ``configs.py`` lists the tile sizes a kernel
may run with, ``tuning.py`` chooses among them by measurement.

fp32, bf16 and fp16, summed in fp32; a weight may be wider than the inputs, as fp32 values are
under autocast. fp32 operands are multiplied in three TF32 products, at most some three bits less
exact than fp32, or in one, if PyTorch is told that TF32 will do (``launch._precision``).
Sums over split columns or tokens are added up in a fixed order: a result repeats bit for bit.

The ops that these functions serve are opaque to Inductor, and not ``triton_op``: Inductor fuses
nothing into a user's kernel, and it would fix the tile sizes and the engine when it compiles,
where here they are measured for the number of tokens met. A launch needs no more than the
current stream, so CUDA graphs (``mode="reduce-overhead"``) capture the ops as they are.

Triton is imported when a kernel is first wanted: on a machine without a GPU it need not exist.
"""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

DEVICES = ("cuda",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)
"""Compute capability from which tensor cores take bf16."""
_LAUNCHED = (
    "magnitude_mask", "prune", "backward_mask", "expand", "expand_twice_pruned", "compress",
    "transpose", "sparse_linear", "sparse_input_grad", "sparse_weight_grad", "low_rank_update",
)  # fmt: skip


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """What keeps this engine from serving such tensors, or ""."""
    if device.type != "cuda" and not (interpreted() and device.type == "cpu"):
        return f"it computes on NVIDIA GPUs, not on {device}"
    if dtype not in _DTYPES:
        return f"it has no kernels for {dtype}"
    return unavailable() or ("" if device.type == "cpu" else _too_old(device))


def unavailable() -> str:
    """What keeps this engine from serving at all on this machine, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "triton isn't installed"
    if interpreted():
        return ""
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, and this PyTorch is for AMD's"
    return "" if torch.cuda.is_available() else "there is no CUDA device"


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes", "y")


@functools.cache
def _too_old(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    if capability >= _OLDEST:
        return ""
    return "{} has compute capability {}.{}, and it needs {}.{}".format(
        device, *capability, *_OLDEST
    )


def __getattr__(name: str) -> Any:
    if name not in _LAUNCHED:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.launch"), name)
