"""The sparse linear with its adapter, where no gradients are needed: METHOD's merged form."""

from collections.abc import Callable

import torch
from torch import Tensor

from slope_fx.kernels.engines import AUTO, ENGINES
from slope_fx.ops.autocast import cast, register_autocast
from slope_fx.ops.sparse_linear import autocast_values, choose, product


@torch.library.custom_op("slope_fx::sparse_adapted_linear", mutates_args=())
def sparse_adapted_linear(
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    n: int,
    m: int,
    engine: str = "",
    engines: str = AUTO,
) -> Tensor:
    """``Y = X (W^R)^T + b + scale (X A^T) B^T``, the last added to the product in place.

    Source: SLoPe, arXiv 2405.16325, "Lazy adapters" in METHOD.

    Args:
        x: (..., d_in).
        values, forward_mask, bias, n, m, engine, engines: as for :func:`sparse_linear`.
        lora_a: (r, d_in).
        lora_b: (d_out, r).
        scale: alpha / r.

    Returns:
        (..., d_out). It has no gradient: graphs that train have the parts.
    """
    engine = engine or choose("sparse_linear", x, values, n, m, engines)
    y = product(x, values, forward_mask, bias, n, m, engine, False)
    down = torch.nn.functional.linear(x, lora_a)
    update: Callable[..., Tensor] = ENGINES[engine].low_rank_update
    return update(y, down, lora_b, scale)


@sparse_adapted_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    n: int,
    m: int,
    engine: str = "",
    engines: str = AUTO,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _autocast(
    dtype: torch.dtype,
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    n: int,
    m: int,
    engine: str = "",
    engines: str = AUTO,
) -> tuple[object, ...]:
    x, a, b = (cast(t, dtype) for t in (x, lora_a, lora_b))
    bias = None if bias is None else cast(bias, dtype)
    engine = engine or choose("sparse_linear", x, values, n, m, engines)
    values = autocast_values(values, dtype, engine)
    return x, values, forward_mask, bias, a, b, scale, n, m, engine, engines


register_autocast(torch.ops.slope_fx.sparse_adapted_linear.default, _autocast)
