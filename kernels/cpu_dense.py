"""The dense engine with C around the product: expand and compress at the speed of memory.

For CPUs on which the vendor's dense product is faster than N/M of the work done otherwise,
as with bf16 matrix units: it costs what a dense layer does and the writing of one weight.
"""

import torch
from torch import Tensor

from slope_fx.kernels import cpu
from slope_fx.kernels.cpu import backward_mask, compress, expand, magnitude_mask, why_not


def sparse_linear(
    x: Tensor, values: Tensor, forward_mask: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """``Y = X (W^R)^T + b``."""
    return torch.nn.functional.linear(x, expand(values, forward_mask, n, m), bias)


def sparse_input_grad(
    grad: Tensor, values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
) -> Tensor:
    """``grad_X = grad_Y W^{R,C}``."""
    transposed, bits = cpu.transpose(values, forward_mask, backward_mask, n, m)
    return torch.nn.functional.linear(grad, expand(transposed, bits, n, m))


def sparse_weight_grad(grad: Tensor, x: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """``grad_W = grad_Y^T X`` at the forward mask's positions, compressed."""
    dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return compress(dense, forward_mask, n, m)


__all__ = [
    "backward_mask",
    "compress",
    "expand",
    "magnitude_mask",
    "sparse_input_grad",
    "sparse_linear",
    "sparse_weight_grad",
    "why_not",
]
