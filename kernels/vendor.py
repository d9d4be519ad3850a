"""The vendor's dense product with a weight that the kernels of an engine expand.

It is the fastest where a dense product is faster than a sparse one with N/M of the work, for
example on matrix units. It takes the time of a dense layer and of the expansion of one weight.
"""

import torch
from torch import Tensor

from slope_fx.kernels.engine import Engine


class VendorProducts(Engine):
    """Dense products with the masks and conversions of another engine.

    Args:
        around: the engine that computes masks and conversions.
    """

    expands_weights = True

    def __init__(self, around: Engine) -> None:
        self.name = f"{around.name}-dense"
        self.devices = around.devices
        self.around: Engine = around

    def unavailable(self) -> str:
        return self.around.unavailable()

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str:
        return self.around.why_not(device, dtype)

    def warns(self, allowed: tuple[str, ...], named: bool) -> bool:
        """The engine around it gives the same reason."""
        return self.around.name not in allowed

    def magnitude_mask(self, weight: Tensor, n: int, m: int) -> Tensor:
        return self.around.magnitude_mask(weight, n, m)

    def backward_mask(self, values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        return self.around.backward_mask(values, forward_mask, n, m)

    def expand(self, values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        return self.around.expand(values, forward_mask, n, m)

    def expand_twice_pruned(
        self, values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
    ) -> Tensor:
        return self.around.expand_twice_pruned(values, forward_mask, backward_mask, n, m)

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
        return self.around.expand_quantised(codes, scales, forward_mask, n, m, group, d_in, dtype)

    def compress(self, dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        return self.around.compress(dense, forward_mask, n, m)
