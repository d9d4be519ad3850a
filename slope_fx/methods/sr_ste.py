"""SR-STE: a straight-through estimator that shrinks the pruned elements."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slope_fx.kernels.packing import unpack
from slope_fx.methods.method import DenseMaster, is_within


@dataclass(frozen=True)
class SRSTE(DenseMaster):
    """The forward reads the top N magnitudes of each M. Each step chooses them again.

    The gradient of the pruned elements gets ``decay`` times the elements (equation 10 of the
    paper), once for each step of the optimizer, after clipping and unscaling.

    Attributes:
        decay: the factor of the pruned elements, as in the paper 2e-4.
    """

    name: ClassVar[str] = "sr-ste"
    source: ClassVar[str] = "SR-STE, arXiv 2102.04010"
    decay: float = 2e-4

    def __post_init__(self) -> None:
        self.check("decay", is_within(self.decay, 0, math.inf), "a number from 0 up")

    def change_gradient(
        self, gradient: Tensor, kept: Tensor, forward_bits: Tensor, scale: Tensor | float
    ) -> None:
        pruned = ~unpack(forward_bits, kept.shape[-1])
        gradient.add_(kept * pruned * scale, alpha=self.decay)
