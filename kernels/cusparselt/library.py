"""cuSPARSELt as PyTorch binds it: the few calls that the engine is built on, and nothing else.

What the library wants, and does not always check, is kept here in one place:

- only the first operand may be sparse, so a linear is computed as ``Y^T = W X^T``;
- PyTorch reads the dense operand as transposed if, and only if, it isn't contiguous, whatever
  its strides are: of ``X^T`` it may be given the transpose of a contiguous ``X``, no other view;
- rows and columns of the sparse operand are multiples of 16, those of the dense one of 8,
  and all memory is aligned to 16 bytes;
- more than two nonzeros among four are dropped without a word;
- its handle is bound to the device it was first used on.

The compressed operand is the library's own affair: PyTorch allocates one row for each row of the
matrix, 9/16 as long.
"""

import functools

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
SPARSE_MULTIPLE, DENSE_MULTIPLE, ALIGNMENT = 16, 8, 16
_OLDEST = (8, 0)
"""Compute capability of the first sparse tensor cores."""


def version() -> str:
    """The library's version as it numbers itself, or "" without it."""
    return str(torch.backends.cusparselt.version() or "")


def unavailable() -> str:
    """What keeps the library from serving at all on this machine, or ""."""
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, and this PyTorch is for AMD's"
    if not torch.backends.cusparselt.is_available():
        return "this PyTorch was built without cuSPARSELt"
    return "" if torch.cuda.is_available() else "there is no CUDA device"


@functools.cache
def why_not(device: torch.device) -> str:
    """What keeps the library from serving on ``device``, or ""."""
    if device.type != "cuda":
        return f"it computes on NVIDIA GPUs, not on {device}"
    if reason := unavailable():
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return "{} has compute capability {}.{}, and sparse tensor cores came with {}.{}".format(
            device, *capability, *_OLDEST
        )
    home = _home(device)
    return "" if device == home else f"PyTorch's handle of it is bound to {home}"


_homes: list[torch.device] = []


def _home(device: torch.device) -> torch.device:
    if not _homes:
        _homes.append(device)
    return _homes[0]


def compress(dense: Tensor) -> Tensor:
    """The sparse operand of a 2:4 matrix.

    Args:
        dense: (rows, columns), contiguous, 16-bit, at most two nonzeros in each four of a row.
    """
    return torch._cslt_compress(dense)


def multiply(operand: Tensor, x: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
    """``X W^T + b``.

    Args:
        operand: what :func:`compress` made of ``W`` (d_out, d_in).
        x: (tokens, d_in), contiguous.
        bias: (d_out,), contiguous, or None.
        algorithm: one that :func:`search` gave, or 0.

    Returns:
        (tokens, d_out), contiguous.
    """
    return torch._cslt_sparse_mm(operand, x.t(), bias=bias, transpose_result=True, alg_id=algorithm)


def search(operand: Tensor, x: Tensor, bias: Tensor | None) -> int:
    """The algorithm that the library finds fastest for :func:`multiply`, by trying them out."""
    return int(torch._cslt_sparse_mm_search(operand, x.t(), bias=bias, transpose_result=True))
