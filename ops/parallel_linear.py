"""Several pruned weights on one input (q, k, v; gate, up) as one op, their parameters apart.

What it saves is not arithmetic: one dispatch instead of several, forward and backward, an input
gradient that is summed in place, and with the CPU engine the packing of the input, done once for
all. Each weight's products are computed by an engine of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slope_fx.kernels import cpu
from slope_fx.kernels.engines import AUTO
from slope_fx.ops.autocast import cast, register_autocast
from slope_fx.ops.sparse_linear import autocast_values, choose, input_grad, product, weight_grad


@torch.library.custom_op("slope_fx::sparse_parallel_linear", mutates_args=())
def sparse_parallel_linear(
    x: Tensor,
    values: Sequence[Tensor],
    forward_masks: Sequence[Tensor],
    backward_masks: Sequence[Tensor],
    biases: Sequence[Tensor],
    n: int,
    m: int,
    chosen: str = "",
    input_chosen: str = "",
    weight_chosen: str = "",
    engines: str = AUTO,
) -> list[Tensor]:
    """:func:`sparse_linear` of one input with each of several weights.

    Args:
        x: (..., d_in).
        values, forward_masks, backward_masks, biases: of each weight, as for
            :func:`sparse_linear`; d_out may differ. No biases at all, or one a weight.
        n, m: the pattern of all.
        chosen, input_chosen, weight_chosen: the engines, by name with commas, one a weight; ""
            for whatever of ``engines`` proves fastest.
        engines: "auto", or names separated by commas.

    Returns:
        (..., d_out) of each.
    """
    training = bool(input_chosen or weight_chosen)
    names = _each(chosen, values)
    added: Sequence[Tensor | None] = biases or [None] * len(values)
    if set(names) == {"cpu"} and len(values) <= 8 and all(v.dtype == x.dtype for v in values):
        # This engine has a product of several weights.
        return cpu.sparse_linears(x, values, forward_masks, added, n, m)
    results = []
    for v, mask, bias, engine in zip(values, forward_masks, added, names, strict=True):
        engine = engine or choose("sparse_linear", x, v, n, m, engines)
        results.append(product(x, v, mask, bias, n, m, engine, training))
    return results


@sparse_parallel_linear.register_fake
def _(
    x: Tensor,
    values: Sequence[Tensor],
    forward_masks: Sequence[Tensor],
    backward_masks: Sequence[Tensor],
    biases: Sequence[Tensor],
    n: int,
    m: int,
    chosen: str = "",
    input_chosen: str = "",
    weight_chosen: str = "",
    engines: str = AUTO,
) -> list[Tensor]:
    for v in values:
        torch._check(
            x.shape[-1] == v.shape[1] * m // n,
            lambda: (
                f"slope_fx::sparse_parallel_linear: x has {x.shape[-1]} features, not as many "
                "as each of the weights reads"
            ),
        )
    return [x.new_empty((*x.shape[:-1], v.shape[0])) for v in values]


@torch.library.custom_op("slope_fx::sparse_parallel_input_grad", mutates_args=())
def sparse_parallel_input_grad(
    grads: Sequence[Tensor],
    values: Sequence[Tensor],
    forward_masks: Sequence[Tensor],
    backward_masks: Sequence[Tensor],
    n: int,
    m: int,
    chosen: str = "",
) -> Tensor:
    """The sum of the weights' ``grad_Y W^{R,C}``: (..., d_in)."""
    total: Tensor | None = None
    parts = zip(grads, values, forward_masks, backward_masks, _each(chosen, values), strict=True)
    for grad, v, forward, backward, engine in parts:
        engine = engine or choose("sparse_input_grad", grad, v, n, m, AUTO)
        part = input_grad(grad, v, forward, backward, n, m, engine)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


@sparse_parallel_input_grad.register_fake
def _(
    grads: Sequence[Tensor],
    values: Sequence[Tensor],
    forward_masks: Sequence[Tensor],
    backward_masks: Sequence[Tensor],
    n: int,
    m: int,
    chosen: str = "",
) -> Tensor:
    return grads[0].new_empty((*grads[0].shape[:-1], values[0].shape[1] * m // n))


@torch.library.custom_op("slope_fx::sparse_parallel_weight_grad", mutates_args=())
def sparse_parallel_weight_grad(
    grads: Sequence[Tensor],
    x: Tensor,
    forward_masks: Sequence[Tensor],
    n: int,
    m: int,
    chosen: str = "",
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The weights' ``grad_Y^T X`` where kept: (d_out, d_in * N / M) each, in ``dtype``."""
    kept = x.shape[-1] * n // m
    results = []
    for grad, mask, engine in zip(grads, forward_masks, _each(chosen, grads), strict=True):
        v = grad.new_empty((grad.shape[-1], kept), device="meta")
        engine = engine or choose("sparse_weight_grad", grad, v, n, m, AUTO)
        results.append(weight_grad(grad, x, mask, n, m, engine, dtype))
    return results


@sparse_parallel_weight_grad.register_fake
def _(
    grads: Sequence[Tensor],
    x: Tensor,
    forward_masks: Sequence[Tensor],
    n: int,
    m: int,
    chosen: str = "",
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    kept = x.shape[-1] * n // m
    return [g.new_empty((g.shape[-1], kept), dtype=dtype or g.dtype) for g in grads]


def _each(chosen: str, weights: Sequence[Tensor]) -> list[str]:
    return chosen.split(",") if chosen else [""] * len(weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, values, forward_masks, backward_masks, _, ctx.n, ctx.m, _, *ctx.engines = inputs
    ctx.count = len(values)
    ctx.save_for_backward(x, *values, *forward_masks, *backward_masks)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    count, n, m = ctx.count, ctx.n, ctx.m
    values, forward, backward = (rest[i * count : (i + 1) * count] for i in range(3))
    input_chosen, weight_chosen, engines = ctx.engines
    dx = None
    dvalues: list[Tensor | None] = [None] * count
    if ctx.needs_input_grad[0]:
        chosen = input_chosen or _choose_each("sparse_input_grad", grads, values, n, m, engines)
        dx = sparse_parallel_input_grad(grads, values, forward, backward, n, m, chosen)
    wanted = [i for i in range(count) if ctx.needs_input_grad[1][i]]
    if wanted:
        chosen = weight_chosen or _choose_each("sparse_weight_grad", grads, values, n, m, engines)
        dtype = None if values[0].dtype == grads[0].dtype else values[0].dtype
        parts = sparse_parallel_weight_grad(
            [grads[i] for i in wanted], x, [forward[i] for i in wanted], n, m,
            ",".join(chosen.split(",")[i] for i in wanted), dtype,
        )  # fmt: skip
        for i, part in zip(wanted, parts, strict=True):
            dvalues[i] = part
    dbiases = [
        grads[i].reshape(-1, grads[i].shape[-1]).sum(0) if needed else None
        for i, needed in enumerate(ctx.needs_input_grad[4])
    ]
    nothing = [None] * count
    results = (dx, dvalues, nothing, nothing, dbiases, *[None] * 6)
    # The dispatcher leaves out arguments at their defaults, and counts.
    return results[: len(ctx.needs_input_grad)]


def _choose_each(
    op: str, grads: list[Tensor], values: list[Tensor], n: int, m: int, engines: str
) -> str:
    return ",".join(choose(op, g, v, n, m, engines) for g, v in zip(grads, values, strict=True))


sparse_parallel_linear.register_autograd(_backward, setup_context=_save)


def _autocast(
    dtype: torch.dtype,
    x: Tensor,
    values: Sequence[Tensor],
    forward_masks: Sequence[Tensor],
    backward_masks: Sequence[Tensor],
    biases: Sequence[Tensor],
    n: int,
    m: int,
    chosen: str = "",
    *rest: Any,
) -> tuple[Any, ...]:
    x = cast(x, dtype)
    biases = [cast(bias, dtype) for bias in biases]
    engines = rest[2] if len(rest) > 2 else AUTO
    chosen = chosen or _choose_each("sparse_linear", [x] * len(values), list(values), n, m, engines)
    values = [
        autocast_values(v, dtype, engine)
        for v, engine in zip(values, chosen.split(","), strict=True)
    ]
    return (x, values, forward_masks, backward_masks, biases, n, m, chosen, *rest)


register_autocast(torch.ops.slope_fx.sparse_parallel_linear.default, _autocast)
