"""S-STE: a continuous pruning function."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from slope_fx import ops
from slope_fx.methods.method import DenseMaster
from slope_fx.ops.masks import unpacked

if TYPE_CHECKING:
    from slope_fx.planning.patterns import Pattern


@dataclass(frozen=True)
class SSTE(DenseMaster):
    """The forward reads ``beta * sign(w) * max(|w| - t, 0)``.

    ``t`` is the largest pruned magnitude of the group of M, so the function is continuous (the
    paper has 2:4, where it is the second smallest). ``beta`` minimizes ``|W - beta * S(W)|^2`` for
    the initial weights, and is kept. The paper also estimates the weight gradient from a 2:4
    sparse output gradient, and rounds to FP8; here both products of the backward pass are exact.
    """

    name: ClassVar[str] = "s-ste"
    source: ClassVar[str] = "S-STE, arXiv 2409.09099"

    def factor(self, matrix: Tensor, forward_bits: Tensor, pattern: "Pattern") -> Tensor | None:
        if matrix.is_meta:
            return torch.ones((), device="meta")
        soft = _soft(matrix.detach().contiguous(), forward_bits, pattern).double()
        kept = ops.compress(matrix.detach().contiguous(), forward_bits, pattern.n, pattern.m)
        # S(W) is zero where W is pruned, so the kept elements are enough.
        beta = (kept.double() * soft).sum() / soft.square().sum()
        # All magnitudes of each group are equal: nothing is left to scale.
        return torch.where(beta.isfinite(), beta, torch.ones_like(beta)).float()

    def values(
        self, kept: Tensor, forward_bits: Tensor, factor: Tensor | None, pattern: "Pattern"
    ) -> Tensor:
        assert factor is not None
        return _soft(kept.detach(), forward_bits, pattern) * factor.to(kept.dtype)


def _soft(matrix: Tensor, forward_bits: Tensor, pattern: "Pattern") -> Tensor:
    """The kept elements (rows, d_in * N / M), moved towards zero by the largest pruned one."""
    n, m = pattern.n, pattern.m
    values = ops.compress(matrix, forward_bits, n, m)
    pruned = matrix.abs().masked_fill(unpacked(forward_bits, matrix.shape[-1]), 0)
    threshold = pruned.unflatten(-1, (-1, m)).amax(-1, keepdim=True)
    groups = values.unflatten(-1, (-1, n))
    return (groups.sign() * (groups.abs() - threshold).relu()).flatten(-2)
