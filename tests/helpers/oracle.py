"""Comparisons with the oracle, and its answers from one unpacking of the masks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slope_fx.kernels import reference


def assert_same(got: Tensor, want: Tensor) -> None:
    """Bit for bit, NaN included; on whatever devices they are."""
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=0, atol=0, equal_nan=True)


def assert_within_rounding(got: Tensor, want: Tensor, magnitude: Tensor, dtype) -> None:
    """``got`` within a few roundings of ``want``, given the sum of the terms' magnitudes.

    A GPU's fp32 products are three of TF32 with its eleven bits each, and may lose three bits.
    """
    roundings = 32 if got.is_cuda and dtype == torch.float32 else 4
    bound = roundings * torch.finfo(dtype).eps * magnitude + torch.finfo(dtype).tiny
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert ((got.cpu().double() - want).abs() <= bound).all()


@dataclass
class DenseOracle:
    """A compressed weight as dense float64 matrices, on the CPU.

    Attributes:
        kept: bool (d_out, d_in), the forward mask.
        weight, twice: ``W^R`` and ``W^{R,C}``.
    """

    kept: Tensor
    weight: Tensor
    twice: Tensor

    @classmethod
    def of(cls, values: Tensor, forward: Tensor, backward: Tensor, n: int, m: int):
        values, forward, backward = values.cpu(), forward.cpu(), backward.cpu()
        kept = reference.unpack_bits(forward, values.shape[1] * m // n)
        weight = torch.zeros(kept.shape, dtype=torch.float64)
        twice = weight.clone()
        weight[kept] = values.double().reshape(-1)
        still = reference.unpack_bits(backward, values.shape[1])
        twice[kept] = torch.where(still, values.double(), 0.0).reshape(-1)
        return cls(kept, weight, twice)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``Y`` and the sum of its terms' magnitudes; so do the others."""
        x = x.cpu().double()
        y, size = x @ self.weight.t(), x.abs() @ self.weight.abs().t()
        return (y, size) if bias is None else (y + bias.cpu(), size + bias.cpu().abs())

    def input_grad(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        grad = grad.cpu().double()
        return grad @ self.twice, grad.abs() @ self.twice.abs()

    def weight_grad(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        grad, x = (t.cpu().double().reshape(-1, t.shape[-1]) for t in (grad, x))
        pair = grad.t() @ x, grad.abs().t() @ x.abs()
        first, second = (dense[self.kept].view(len(self.kept), -1) for dense in pair)
        return first, second
