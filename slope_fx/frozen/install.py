"""Install frozen weights in a model, in place of dense or of sparse weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from slope_fx.frozen.weight import FrozenWeight, Kept, forward_linear
from slope_fx.kernels import quantised
from slope_fx.kernels.cpu.routes import (
    Product,
    allowed_routes,
    form_of,
    measured_routes,
    random_mask,
)
from slope_fx.kernels.engines import allowed_engines
from slope_fx.ops.frozen import FROZEN_LINEAR, why_not_native
from slope_fx.planning.plan import SparsePlan, sparse_name, values_name
from slope_fx.planning.trace import linear_classes
from slope_fx.sparse.install import set_kind
from slope_fx.sparse.sharded_first import Places
from slope_fx.sparse.weight import SparseWeight


@dataclass(frozen=True)
class FrozenParts:
    """The tensors of a frozen weight.

    Attributes:
        values: (stack * d_out, d_in * N / M); or codes, as in ``kernels/quantised.py``.
        forward_bits: uint8 (stack * d_out, ceil(d_in / 8)).
        dtype: dtype of the dense weight.
        adapter: A (stack * r, d_in), and B with the scale in it (stack * d_out, r); or None.
        scales: the scales of codes; None for values.
        group: the number of codes that share a scale; 0 for values.
    """

    values: Tensor
    forward_bits: Tensor
    dtype: torch.dtype
    adapter: tuple[Tensor, Tensor] | None = None
    scales: Tensor | None = None
    group: int = 0

    @property
    def bits(self) -> int:
        """The bits of a code; 0 for values."""
        return 0 if self.scales is None else quantised.BITS[quantised.kind_of(self.values)]

    @property
    def rank(self) -> int:
        """The rank of the adapter; 0 without one."""
        return 0 if self.adapter is None else self.adapter[1].shape[1]


def sparse_places(model: nn.Module) -> dict[SparseWeight, Places]:
    """The places of each sparse weight of a model."""
    places: dict[SparseWeight, Places] = {}
    for module in model.modules():
        for attribute in getattr(getattr(type(module), "_slope_kind", None), "attributes", ()):
            weight = module._modules[sparse_name(attribute)]
            places.setdefault(cast(SparseWeight, weight), []).append((module, attribute))
    return places


def folded(
    a: Tensor | None, b: Tensor | None, scale: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """A and ``scale * B``. The scale is applied before a cast."""
    assert a is not None
    assert b is not None
    a, b = a.detach(), b.detach()
    return a.to(dtype or a.dtype, copy=True), (b * scale).to(dtype or b.dtype)


def put_weight(plan: SparsePlan, places: Places, parts: FrozenParts, engines: str) -> FrozenWeight:
    """Put a frozen weight into the modules that share a weight.

    Args:
        plan: plan of the linear.
        places: the modules, and the attribute of the dense weight in each.
        parts: the tensors.
        engines: the allowed engines, as in :class:`~slope_fx.backend.Settings`.
    """
    form = form_of_parts(plan, parts, engines)
    weight = FrozenWeight(plan, *places[0], parts.forward_bits, parts.scales, parts.adapter, form)
    values = Kept(parts.values)
    for module, attribute in places:
        module._parameters.pop(attribute, None)
        module._parameters.pop(values_name(attribute), None)
        module._modules.pop(sparse_name(attribute), None)
        module._parameters[values_name(attribute)] = values
        weight.holders.append((module, values_name(attribute)))
        module._modules[sparse_name(attribute)] = weight
        forward = None
        if plan.layout.stack == 1 and attribute == "weight" and _is_plain(module):
            forward = forward_linear
        set_kind(module, (attribute,), forward=forward)
    return weight


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear whose forward is the product with its weight and bias."""
    kind: Any = getattr(type(module), "_slope_kind", None)
    base: type[nn.Module] = type(module) if kind is None else kind.base
    return any(base.forward is known.forward for known in linear_classes())


def form_of_parts(plan: SparsePlan, parts: FrozenParts, engines: str) -> tuple[int, ...]:
    """The form of a weight. Its routes are measured once for each shape."""
    layout, pattern = plan.layout, plan.pattern
    product = Product(
        layout.d_out, layout.d_in, pattern.n, pattern.m, parts.dtype, parts.rank, parts.bits,
        parts.group,
    )  # fmt: skip
    measurable = parts.values.device.type == "cpu" and parts.dtype != torch.float64
    if not measurable or why_not_native():
        return tuple(form_of(product))
    allowed = allowed_routes(product, allowed_engines(engines))
    return tuple(form_of(product, measured_routes(product, allowed, _random_weight)))


def _random_weight(product: Product) -> Callable[[Tensor, list[int]], Tensor]:
    """A function that computes a product of its size with a random weight."""
    width = product.d_in * product.n // product.m
    values = torch.randn(product.d_out, width).to(product.dtype)
    scales = None
    if product.bits:
        kind = next(kind for kind, bits in quantised.BITS.items() if bits == product.bits)
        values, scales = quantised.quantise(values, kind, product.group)
    mask = random_mask(product.d_out, product.d_in, product.n, product.m)
    a = b = None
    if product.rank:
        a = torch.randn(product.rank, product.d_in).to(product.dtype)
        b = torch.randn(product.d_out, product.rank).to(product.dtype)

    def run(x: Tensor, form: list[int]) -> Tensor:
        with torch.inference_mode():
            y: Tensor = FROZEN_LINEAR(x, values, mask, scales, None, a, b, form)
            return y

    return run
