"""The CPU engine: N:M products in C, N/M of the dense work, for any N:M.

Here tensors become pointers; the arithmetic is in ``linear.c`` and ``linear_few.c`` (the
product, and the input gradient through the compressed transpose), ``weight_grad.c`` and
``weights.c`` (expand, compress, the transpose). ``build.py`` compiles and loads them.

fp32, bf16 and fp16, summed in fp32. Results don't depend on the number of threads. NaN or
infinity in a feature always shows in the outputs that keep a weight for it; in those that
don't, it may (as zero times infinity in a dense product does) or may not.
"""

import ctypes
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from slope_fx.kernels.cpu.build import BuildError, library
from slope_fx.kernels.dense import (
    backward_mask,
    bad_forward_mask,
    low_rank_update,
    magnitude_mask,
)
from slope_fx.kernels.operands import Operands
from slope_fx.kernels.packing import packed_width

DEVICES = ("cpu",)
operands = Operands()
"""The transposes that it made of the weights that it met."""
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The codes of ``vectors.h``."""


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """What keeps this engine from serving such tensors, or ""."""
    if device.type != "cpu":
        return f"it computes on the CPU, not on {device}"
    if dtype not in _DTYPES:
        return f"it has no kernels for {dtype}"
    return unavailable()


def unavailable() -> str:
    """What keeps this engine from serving at all on this machine, or ""."""
    try:
        library()
    except BuildError as error:
        return str(error)
    return ""


def expand(values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """Dense ``W^R`` (d_out, d_in) from its kept values (d_out, d_in * N / M)."""
    d_out, d_in = values.shape[0], values.shape[1] * m // n
    dense = values.new_empty(d_out, d_in)
    values, forward_mask = values.contiguous(), forward_mask.contiguous()
    _call(
        library().slope_expand, _pointer(values), _pointer(forward_mask),
        _long(d_out), _long(d_in), n, m, _pointer(dense), _DTYPES[values.dtype], _threads(),
        pattern=(n, m),
    )  # fmt: skip
    return dense


def expand_twice_pruned(
    values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
) -> Tensor:
    """Dense ``W^{R,C}`` (d_out, d_in), as a view of its transpose."""
    transposed, bits = transpose(values, forward_mask, backward_mask, n, m)
    return expand(transposed, bits, n, m).t()


def compress(dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """The kept values (d_out, d_in * N / M) of ``dense`` (d_out, d_in)."""
    d_out, d_in = dense.shape
    values = dense.new_empty(d_out, d_in * n // m)
    dense, forward_mask = _rows(dense), forward_mask.contiguous()
    _call(
        library().slope_compress, _pointer(dense), _long(dense.stride(0)), _pointer(forward_mask),
        _long(d_out), _long(d_in), n, m, _pointer(values), _DTYPES[dense.dtype], _threads(),
        pattern=(n, m),
    )  # fmt: skip
    return values


def sparse_linear(
    x: Tensor, values: Tensor, forward_mask: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """``Y = X (W^R)^T + b``."""
    return sparse_linears(x, [values], [forward_mask], [bias], n, m)[0]


def sparse_linears(
    x: Tensor,
    values: Sequence[Tensor],
    forward_masks: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    n: int,
    m: int,
) -> list[Tensor]:
    """:func:`sparse_linear` with each of at most eight weights; the input is packed once."""
    d_in, count = x.shape[-1], len(values)
    ys = [x.new_empty((*x.shape[:-1], v.shape[0])) for v in values]
    x = _rows(x)
    values = [v.contiguous() for v in values]
    masks = [mask.contiguous() for mask in forward_masks]
    added = [None if bias is None else bias.contiguous() for bias in biases]
    d_outs = (ctypes.c_long * count)(*(v.shape[0] for v in values))
    _call(
        library().slope_linear, _pointer(x), _long(x.stride(0)), _long(x.shape[0]), count,
        _pointers(values), _pointers(masks), _pointers(added), d_outs, _long(d_in), n, m,
        _pointers(ys), _DTYPES[x.dtype], _threads(), pattern=(n, m),
    )  # fmt: skip
    return ys


def sparse_input_grad(
    grad: Tensor, values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
) -> Tensor:
    """``grad_X = grad_Y W^{R,C}``, through the compressed transpose.

    That is made once an optimizer step where it is used more often (``operands.py``).
    """
    transposed, bits = operands.get(
        values,
        (forward_mask, backward_mask),
        ("transpose", n, m),
        lambda: transpose(values, forward_mask, backward_mask, n, m),
        training=True,
    )
    return sparse_linear(grad, transposed, bits, None, n, m)


def transpose(
    values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
) -> tuple[Tensor, Tensor]:
    """The compressed transpose of ``W^{R,C}``: values (d_in, d_out * N / M), packed mask.

    A group with fewer than N kept is filled up with zeros, so it is N:M like any weight.
    """
    d_out, d_in = values.shape[0], values.shape[1] * m // n
    transposed = values.new_empty(d_in, d_out * n // m)
    bits = forward_mask.new_empty(d_in, packed_width(d_out))
    values, forward_mask = values.contiguous(), forward_mask.contiguous()
    backward_mask = backward_mask.contiguous()
    _call(
        library().slope_transpose, _pointer(values), _pointer(forward_mask),
        _pointer(backward_mask), _long(d_out), _long(d_in), n, m,
        _pointer(transposed), _pointer(bits), _DTYPES[values.dtype], _threads(),
        pattern=(n, m),
    )  # fmt: skip
    return transposed, bits


def sparse_weight_grad(grad: Tensor, x: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """``grad_W = grad_Y^T X`` at the forward mask's positions, compressed."""
    d_out, d_in = grad.shape[-1], x.shape[-1]
    dw = grad.new_empty(d_out, d_in * n // m)
    grad, x, forward_mask = _rows(grad), _rows(x), forward_mask.contiguous()
    _call(
        library().slope_weight_grad, _pointer(grad), _long(grad.stride(0)),
        _pointer(x), _long(x.stride(0)), _long(x.shape[0]), _pointer(forward_mask),
        _long(d_out), _long(d_in), n, m, _pointer(dw), _DTYPES[x.dtype], _threads(),
        pattern=(n, m),
    )  # fmt: skip
    return dw


def _rows(tensor: Tensor) -> Tensor:
    """As (rows, columns) with adjacent columns; a copy only if it must be."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


_long = ctypes.c_long


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _pointers(tensors: Sequence[Tensor | None]) -> "ctypes.Array[ctypes.c_void_p]":
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _threads() -> int:
    return torch.get_num_threads()


def _call(entry: "ctypes._NamedFuncPointer", *args: object, pattern: tuple[int, int]) -> None:
    code = entry(*args)
    if code:
        _fail(code, *pattern)


def _fail(code: int, n: int, m: int) -> NoReturn:
    if code == 1:
        raise MemoryError("slope_fx's CPU engine could not get its working memory")
    raise bad_forward_mask(n, m) if code == 2 else ValueError(f"a backward mask isn't {n}:{m}")


__all__ = [
    "backward_mask",
    "compress",
    "expand",
    "expand_twice_pruned",
    "low_rank_update",
    "magnitude_mask",
    "sparse_input_grad",
    "sparse_linear",
    "sparse_linears",
    "sparse_weight_grad",
    "transpose",
    "why_not",
]
