"""What is known of the inputs of a linear from a few calibration batches."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Activations:
    """Sums over the inputs of one linear, or of each of a stack.

    Attributes:
        rows: tokens summed over, (stack,).
        squares: of each input's elements, (stack, d_in), fp32.
        gram: sum of x x^T, (stack, d_in, d_in), fp32; None unless it was asked for.
    """

    rows: Tensor
    squares: Tensor
    gram: Tensor | None
