"""The calls of cuSPARSELt, as PyTorch binds them.

The library has these requirements, and does not check all of them:

- Only the first operand can be sparse, so that a linear is computed as ``Y^T = W X^T``.
- PyTorch reads the dense operand as transposed exactly if it is not contiguous, whatever its
  strides are. The only valid view of ``X^T`` is the transpose of a contiguous ``X``.
- Rows and columns of the sparse operand are multiples of 16, those of the dense operand are
  multiples of 8, and all memory is aligned to 16 bytes.
- If more than two of four values are not zero, the library drops some without an error.
- The library's handle is bound to the device of its first use.

The format of the compressed operand is internal to the library. PyTorch allocates one row for each
row of the matrix, with 9/16 of its length.
"""

import functools

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
SPARSE_MULTIPLE, DENSE_MULTIPLE, ALIGNMENT = 16, 8, 16
_OLDEST = (8, 0)
"""The compute capability of the first sparse tensor cores."""


def version() -> str:
    """The version of the library, or "" if there is none."""
    return str(torch.backends.cusparselt.version() or "")


def unavailable() -> str:
    """The reason why the library cannot run on this machine, or ""."""
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, and this PyTorch is for AMD GPUs"
    if not torch.backends.cusparselt.is_available():
        return "this PyTorch was built without cuSPARSELt"
    return "" if torch.cuda.is_available() else "there is no CUDA device"


@functools.cache
def why_not(device: torch.device) -> str:
    """The reason why the library does not support ``device``, or ""."""
    if device.type != "cuda":
        return f"it computes on NVIDIA GPUs, not on {device}"
    if reason := unavailable():
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return "{} has compute capability {}.{}, and sparse tensor cores need {}.{}".format(
            device, *capability, *_OLDEST
        )
    home = _home(device)
    return "" if device == home else f"PyTorch's handle of the library is bound to {home}"


_homes: list[torch.device] = []


def _home(device: torch.device) -> torch.device:
    if not _homes:
        _homes.append(device)
    return _homes[0]


def compress(dense: Tensor) -> Tensor:
    """The sparse operand of a 2:4 matrix.

    Args:
        dense: (rows, columns), contiguous, 16-bit, at most two nonzeros in each four of a row.

    Returns:
        (rows, columns * 9 / 16), in the dtype of ``dense``.
    """
    return torch._cslt_compress(dense)


def multiply(operand: Tensor, x: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
    """``X W^T + b``.

    Args:
        operand: result of :func:`compress` for ``W`` (d_out, d_in).
        x: (tokens, d_in), contiguous.
        bias: (d_out,), contiguous, or None.
        algorithm: result of :func:`search`, or 0.

    Returns:
        (tokens, d_out), contiguous.
    """
    return torch._cslt_sparse_mm(operand, x.t(), bias=bias, transpose_result=True, alg_id=algorithm)


def search(operand: Tensor, x: Tensor, bias: Tensor | None) -> int:
    """The number of the fastest algorithm for :func:`multiply`, by the library's own search."""
    return int(torch._cslt_sparse_mm_search(operand, x.t(), bias=bias, transpose_result=True))
