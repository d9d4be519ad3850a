"""Gradual pruning: the pruned part fades out."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from slope_fx import ops
from slope_fx.methods.method import DenseMaster, Method, WeightState, is_within
from slope_fx.ops.masks import unpacked

if TYPE_CHECKING:
    from slope_fx.planning.patterns import Pattern


@dataclass(frozen=True)
class Gradual(DenseMaster):
    """The forward reads ``W * (M + f * (1 - M))``, with a factor f that falls from 1 to 0.

    The mask M keeps the top N magnitudes of each group. Each step chooses it again, until f is 0.
    Gradients are those of the formula, so that of a pruned element fades too. While f is above 0
    all three products are dense. Then the masks are kept, and the products are those of SLoPe.

    Attributes:
        start, end: fractions of the steps between which f falls linearly (MdGf-Linear of the
            paper).
    """

    name: ClassVar[str] = "gradual"
    source: ClassVar[str] = "Progressive Gradient Flow, arXiv 2402.04744"
    fades: ClassVar[bool] = True
    when_expanded: ClassVar[str] = Method.when_expanded
    start: float = 0.0
    end: float = 0.5

    def __post_init__(self) -> None:
        self.check("end", is_within(self.end, 0, 1), "a fraction of the steps from 0 to 1")
        good = is_within(self.start, 0, self.end)
        self.check("start", good, f"a fraction of the steps from 0 to end={self.end}")

    def factor(self, matrix: Tensor, forward_bits: Tensor, pattern: "Pattern") -> Tensor | None:
        return torch.ones((), device=matrix.device)

    def values(
        self, kept: Tensor, forward_bits: Tensor, factor: Tensor | None, pattern: "Pattern"
    ) -> Tensor:
        return ops.compress(kept, forward_bits, pattern.n, pattern.m)

    def factor_at(self, step: int, total_steps: int) -> float | None:
        begin, end = self.start * total_steps, self.end * total_steps
        if step >= end:
            return 0.0
        return 1.0 if step <= begin else (end - step) / (end - begin)

    def weight(self, kept: Tensor, read: WeightState) -> Tensor:
        if read.factor is None or not read.fading:
            return Method.weight(self, kept, read)
        mask = unpacked(read.forward_bits, kept.shape[-1])
        return torch.where(mask, kept, kept * read.factor.to(kept.dtype))

    def moves(self, read: WeightState) -> bool:
        return read.fading
