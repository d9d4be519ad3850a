"""The base class of the engines."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from slope_fx.kernels import conversions, quantised
from slope_fx.kernels.operands import Operands


class Engine:
    """One way to compute the operations on compressed weights.

    An engine sees tensors and integers. It knows nothing about modules, graphs or autograd. Each
    operation has a default that works on all devices and floating dtypes: PyTorch operations
    for masks and conversions, and the vendor's dense product with the expanded weight. An engine
    overrides the operations that it computes in another way.

    Shapes: a weight is (d_out, d_in). Its kept ``values`` are (d_out, d_in * N / M), its packed
    ``forward_mask`` is uint8 (d_out, ceil(d_in / 8)), and its packed ``backward_mask``, with one
    bit per value, is uint8 (d_out, ceil(d_in * N / M / 8)). ``x`` is (..., d_in) and ``grad`` is
    (..., d_out), both in the dtype of the product.

    Attributes:
        name: name in :data:`engines.ENGINES`.
        devices: types of the devices that the engine is made for; None: all.
        competes: whether the engine is a candidate where no engine is named.
        takes_wider_values: whether the products accept fp32 values with 16-bit inputs.
        keeps_operands: whether all products with a weight need an operand, which the engine
            makes from the weight and may keep. Such an engine does not compute products with a
            part of a weight: the part is a new tensor at each use.
        may_refuse: whether a library behind the engine can refuse a product only when it runs.
        expands_weights: whether the engine computes all products as dense products with weights
            that its own kernels expand.
        around: the engine that computes masks and conversions for this engine, if any.
        operands: the operands that the engine made from weights, if it keeps any.
    """

    name: str
    devices: tuple[str, ...] | None = None
    competes = True
    takes_wider_values = False
    keeps_operands = False
    may_refuse = False
    expands_weights = False
    around: "Engine | None" = None
    operands: Operands | None = None

    # --- availability --------------------------------------------------------------------------

    def unavailable(self) -> str:
        """The reason why the engine cannot run on this machine, or ""."""
        return ""

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str:
        """The reason why the engine does not support products on a device in a dtype, or ""."""
        return self.unavailable()

    def why_not_pattern(self, n: int, m: int) -> str:
        """The reason why the engine does not support an N:M pattern, or ""."""
        return ""

    def yields_to(self, other: "Engine") -> bool:
        """Whether this engine is no candidate beside ``other``, unless it is named."""
        return False

    def repeats(self, other: "Engine", op: str) -> bool:
        """Whether ``other`` computes the product ``op`` with the same kernels."""
        return False

    def warns(self, allowed: tuple[str, ...], named: bool) -> bool:
        """Whether a warning gives the reason if the engine cannot compute some products.

        Args:
            allowed: names of the allowed engines.
            named: whether the user named this engine.
        """
        return True

    # --- masks and conversions -----------------------------------------------------------------

    def magnitude_mask(self, weight: Tensor, n: int, m: int) -> Tensor:
        """The packed forward mask of a dense weight: the N top magnitudes of each group."""
        return conversions.magnitude_mask(weight, n, m)

    def backward_mask(self, values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        """The packed backward mask: N:M along d_out, a subset of the kept values."""
        return conversions.backward_mask(values, forward_mask, n, m)

    def expand(self, values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        """The dense ``W^R`` (d_out, d_in)."""
        return conversions.expand(values, forward_mask, n, m)

    def expand_twice_pruned(
        self, values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
    ) -> Tensor:
        """The dense ``W^{R,C}`` (d_out, d_in)."""
        return conversions.expand_twice_pruned(values, forward_mask, backward_mask, n, m)

    def compress(self, dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
        """The kept values (d_out, d_in * N / M) of a dense (d_out, d_in)."""
        return conversions.compress(dense, forward_mask, n, m)

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
        """The dense ``W^R`` (d_out, d_in) of quantised values, rounded to ``dtype``.

        Args:
            codes, scales: of :func:`quantised.quantise`, which describes them.
            forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
            n, m: the pattern.
            group: values that share a scale.
            d_in: columns of the weight.
            dtype: of the result.
        """
        kind, kept = quantised.kind_of(codes), d_in * n // m
        values = quantised.dequantise(codes, scales, kind, group, kept)
        return self.expand(values.to(dtype), forward_mask, n, m)

    # --- products ------------------------------------------------------------------------------

    def values_for(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The values in a dtype that the products accept with inputs in ``dtype``."""
        if self.takes_wider_values and values.dtype == torch.float32:
            return values
        return values.to(dtype)

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
        """``Y = X (W^R)^T + b``.

        Args:
            x: (..., d_in).
            values: (d_out, d_in * N / M), in a dtype of :meth:`values_for`.
            forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
            bias: (d_out,), or None.
            n, m: the pattern.
            training: whether the caller is a graph that trains. Operands are kept for such a
                graph, because it may use the weight again before an optimizer changes it.

        Returns:
            (..., d_out), in the dtype of ``x``.
        """
        return linear(x, self.expand(values, forward_mask, n, m), bias)

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
        """``Y = X (W^R)^T + b`` with quantised values, for a model that does not train.

        Args:
            x: (..., d_in).
            codes, scales: of :func:`quantised.quantise`, which describes them.
            forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
            bias: (d_out,), in the dtype of ``x``, or None.
            n, m: the pattern.
            group: values that share a scale.

        Returns:
            (..., d_out), in the dtype of ``x``.
        """
        weight = (codes, scales, forward_mask, n, m, group)
        return linear(x, self.expand_quantised(*weight, x.shape[-1], x.dtype), bias)

    def sparse_input_grad(
        self,
        grad: Tensor,
        values: Tensor,
        forward_mask: Tensor,
        backward_mask: Tensor,
        n: int,
        m: int,
    ) -> Tensor:
        """``grad_X = grad_Y W^{R,C}``.

        Args:
            grad: (..., d_out).
            values: (d_out, d_in * N / M), in a dtype of :meth:`values_for`.
            forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
            backward_mask: packed, uint8 (d_out, ceil(d_in * N / M / 8)).
            n, m: the pattern.

        Returns:
            (..., d_in), in the dtype of ``grad``.
        """
        weight = self.expand_twice_pruned(values, forward_mask, backward_mask, n, m)
        return linear(grad, weight.t())

    def sparse_weight_grad(
        self,
        grad: Tensor,
        x: Tensor,
        forward_mask: Tensor,
        n: int,
        m: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``grad_W = grad_Y^T X`` at the kept positions.

        Args:
            grad: (..., d_out).
            x: (..., d_in).
            forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
            n, m: the pattern.
            dtype: of the result; None: the dtype of ``grad``.

        Returns:
            (d_out, d_in * N / M).
        """
        dense = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return self.compress(dense, forward_mask, n, m).to(dtype or grad.dtype)
