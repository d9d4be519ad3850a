"""``Activations``: sums over the calibration inputs of a linear."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Activations:
    """Sums over the calibration inputs of one linear, or of each linear of a stack.

    Attributes:
        rows: number of tokens, int64 (stack,).
        squares: sum of the squares of each input feature, fp32 (stack, d_in).
        gram: sum of x x^T, fp32 (stack, d_in, d_in), or None if not needed.
    """

    rows: Tensor
    squares: Tensor
    gram: Tensor | None
