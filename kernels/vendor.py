"""The vendor's dense product on a weight that an engine's own kernels rebuild.

For devices on which that is faster than N/M of the work done otherwise, as with matrix units: it
costs what a dense layer does and the writing of one weight.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class VendorProducts:
    """An engine: ``around``'s masks, expand and compress, with dense products between them.

    Args:
        around: an engine that also has ``expand_twice_pruned`` (values, forward mask, backward
            mask, n, m), which gives the dense ``W^{R,C}``.
    """

    def __init__(self, around: ModuleType) -> None:
        self.around = around

    def __getattr__(self, name: str) -> Any:
        return getattr(self.around, name)

    def sparse_linear(
        self, x: Tensor, values: Tensor, forward_mask: Tensor, bias: Tensor | None, n: int, m: int
    ) -> Tensor:
        """``Y = X (W^R)^T + b``."""
        return torch.nn.functional.linear(x, self.expand(values, forward_mask, n, m), bias)

    def sparse_input_grad(
        self,
        grad: Tensor,
        values: Tensor,
        forward_mask: Tensor,
        backward_mask: Tensor,
        n: int,
        m: int,
    ) -> Tensor:
        """``grad_X = grad_Y W^{R,C}``."""
        weight = self.expand_twice_pruned(values, forward_mask, backward_mask, n, m)
        return torch.nn.functional.linear(grad, weight.t())

    def sparse_weight_grad(
        self, grad: Tensor, x: Tensor, forward_mask: Tensor, n: int, m: int
    ) -> Tensor:
        """``grad_W = grad_Y^T X`` at the forward mask's positions, compressed."""
        dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        values: Tensor = self.compress(dense, forward_mask, n, m)
        return values
