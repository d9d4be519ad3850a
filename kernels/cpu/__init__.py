"""The CPU engine: N:M products in C with N/M of the dense work, for any N:M.

This module passes tensors to the C functions as pointers. ``linear.c`` and ``linear_few.c`` compute
the product, and with the compressed transpose the input gradient. ``weight_grad.c`` computes the
weight gradient, ``weights.c`` expands, compresses and transposes weights. ``linear_quantised.c``
has the product and the expansion for quantised values. ``build.py`` compiles and loads the library.

The engine supports fp32, bf16 and fp16 and sums in fp32. Results do not depend on the number of
threads. NaN or infinity in a feature always appears in the outputs whose rows keep a weight for
this feature. In other outputs it may appear, as in a dense product, where zero times infinity is
NaN.
"""

from typing import NoReturn

import torch
from torch import Tensor

from slope_fx.kernels import quantised
from slope_fx.kernels.conversions import bad_forward_mask
from slope_fx.kernels.cpu.build import BuildError, library
from slope_fx.kernels.engine import Engine
from slope_fx.kernels.operands import Operands
from slope_fx.kernels.packing import packed_width

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The codes of ``vectors.h``."""
_FEW = 32
"""The most tokens for which a quantised weight is not made dense first. (With 16-bit inputs the two
ways take the same time at about 40 tokens, with fp32 ones at more.)"""


class Cpu(Engine):
    """The engine in C.

    Attributes:
        operands: the compressed transposes that :meth:`sparse_input_grad` made.
    """

    name = "cpu"
    devices = ("cpu",)

    def __init__(self) -> None:
        self.operands: Operands = Operands()

    def unavailable(self) -> str:
        try:
            library()
        except BuildError as error:
            return str(error)
        return ""

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str:
        if device.type != "cpu":
            return f"it computes on the CPU, not on {device}"
        if dtype not in _DTYPES:
            return f"it has no kernels for {dtype}"
        return self.unavailable()

    def expand(self, values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        d_out, d_in = values.shape[0], values.shape[1] * m // n
        dense = values.new_empty(d_out, d_in)
        weight = (values.contiguous(), forward_mask.contiguous(), d_out, d_in, n, m)
        _call("slope_expand", *weight, dense, dtype=values.dtype, pattern=(n, m))
        return dense

    def expand_twice_pruned(
        self, values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
    ) -> Tensor:
        """The dense ``W^{R,C}`` (d_out, d_in), as a view of its transpose."""
        transposed, bits = self.transpose(values, forward_mask, backward_mask, n, m)
        return self.expand(transposed, bits, n, m).t()

    def compress(self, dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        d_out, d_in = dense.shape
        values = dense.new_empty(d_out, d_in * n // m)
        dense, mask = _rows(dense), forward_mask.contiguous()
        weight = (dense, dense.stride(0), mask, d_out, d_in, n, m)
        _call("slope_compress", *weight, values, dtype=values.dtype, pattern=(n, m))
        return values

    def transpose(
        self, values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
    ) -> tuple[Tensor, Tensor]:
        """The compressed transpose of ``W^{R,C}``.

        A group with fewer than N kept values gets zeros, so that the transpose is N:M.

        Returns:
            Its values (d_in, d_out * N / M), and its packed mask, uint8 (d_in, ceil(d_out / 8)).
        """
        d_out, d_in = values.shape[0], values.shape[1] * m // n
        transposed = values.new_empty(d_in, d_out * n // m)
        bits = forward_mask.new_empty(d_in, packed_width(d_out))
        masks = (forward_mask.contiguous(), backward_mask.contiguous())
        weight = (values.contiguous(), *masks, d_out, d_in, n, m)
        outputs = (transposed, bits)
        _call("slope_transpose", *weight, *outputs, dtype=values.dtype, pattern=(n, m))
        return transposed, bits

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
        d_out = codes.shape[0]
        dense = codes.new_empty(d_out, d_in, dtype=dtype)
        weight = (*_quantised(codes, scales, forward_mask), d_out, d_in, n, m)
        arguments = (*weight, _bits(codes), group, dense)
        _call("slope_expand_quantised", *arguments, dtype=dtype, pattern=(n, m))
        return dense

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
        d_out, d_in = values.shape[0], x.shape[-1]
        y = x.new_empty((*x.shape[:-1], d_out))
        x, bias = _rows(x), None if bias is None else bias.contiguous()
        weight = (values.contiguous(), forward_mask.contiguous(), bias, d_out, d_in, n, m)
        inputs = (x, x.stride(0), x.shape[0])
        _call("slope_linear", *inputs, *weight, y, dtype=x.dtype, pattern=(n, m))
        return y

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
        """As :meth:`Engine.quantised_linear`. The inputs are rounded to 16-bit integers, with a
        power of two for each block of columns: see ``linear_quantised.c``."""
        if x.numel() // x.shape[-1] > _FEW:
            return super().quantised_linear(x, codes, scales, forward_mask, bias, n, m, group)
        d_out, d_in = codes.shape[0], x.shape[-1]
        y = x.new_empty((*x.shape[:-1], d_out))
        x, bias = _rows(x), None if bias is None else bias.contiguous()
        weight = (*_quantised(codes, scales, forward_mask), bias, d_out, d_in, n, m)
        arguments = (x, x.stride(0), x.shape[0], *weight, _bits(codes), group, y)
        _call("slope_linear_quantised", *arguments, dtype=x.dtype, pattern=(n, m))
        return y

    def sparse_input_grad(
        self,
        grad: Tensor,
        values: Tensor,
        forward_mask: Tensor,
        backward_mask: Tensor,
        n: int,
        m: int,
    ) -> Tensor:
        """``grad_X = grad_Y W^{R,C}``: the product with the compressed transpose, an operand."""

        def make() -> tuple[Tensor, Tensor]:
            return self.transpose(values, forward_mask, backward_mask, n, m)

        masks, purpose = (forward_mask, backward_mask), ("transpose", n, m)
        transposed, bits = self.operands.get(values, masks, purpose, make, training=True)
        return self.sparse_linear(grad, transposed, bits, None, n, m)

    def sparse_weight_grad(
        self,
        grad: Tensor,
        x: Tensor,
        forward_mask: Tensor,
        n: int,
        m: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        d_out, d_in = grad.shape[-1], x.shape[-1]
        dw = grad.new_empty(d_out, d_in * n // m)
        grad, x, mask = _rows(grad), _rows(x), forward_mask.contiguous()
        factors = (grad, grad.stride(0), x, x.stride(0), x.shape[0])
        weight = (mask, d_out, d_in, n, m)
        _call("slope_weight_grad", *factors, *weight, dw, dtype=x.dtype, pattern=(n, m))
        return dw.to(dtype or dw.dtype)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor as (rows, columns) with adjacent columns; a copy only if no view is possible."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _quantised(codes: Tensor, scales: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return codes.contiguous(), scales.contiguous(), mask.contiguous()


def _bits(codes: Tensor) -> int:
    return quantised.BITS[quantised.kind_of(codes)]


def _call(
    entry: str, *arguments: Tensor | int | None, dtype: torch.dtype, pattern: tuple[int, int]
) -> None:
    """Call a C function. It gets the addresses of tensors, and None as NULL.

    Raises:
        MemoryError: there is no working memory.
        ValueError: a mask does not have the pattern.
    """
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    code = getattr(library(), entry)(*values, _DTYPES[dtype], torch.get_num_threads())
    if code:
        _fail(code, *pattern)


def _fail(code: int, n: int, m: int) -> NoReturn:
    if code == 1:
        raise MemoryError("The CPU engine of slope_fx could not allocate its working memory.")
    if code == 4:
        raise ValueError("group: a quantised weight has groups of 32, 64 or 128 values.")
    raise bad_forward_mask(n, m) if code == 2 else ValueError(f"A backward mask is not {n}:{m}.")
