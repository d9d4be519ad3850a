"""The linear with a pruned weight and a double-pruned gradient (METHOD, "The three products").

The same ops compute products with one weight and with a stack of weights, such as the experts of a
mixture. Each weight of a stack is (d_out, d_in) and is pruned separately. Values and masks of a
stack are concatenated along the rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slope_fx.kernels.engines import AUTO, ENGINES
from slope_fx.kernels.selection import choose
from slope_fx.ops import groups as grouped
from slope_fx.ops.autocast import cast, register_autocast
from slope_fx.ops.dispatch import request_of
from slope_fx.ops.weights import expand


@torch.library.custom_op("slope_fx::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    groups: int = 1,
    offsets: Tensor | None = None,
    engine: str = "",
    input_engine: str = "",
    weight_engine: str = "",
    engines: str = AUTO,
    master: Tensor | None = None,
) -> Tensor:
    """``Y = X (W^R)^T + b``, with ``grad_X = grad_Y W^{R,C}`` and a compressed ``grad_W``.

    Source: SLoPe, arXiv 2405.16325, equations 4 to 6.

    Args:
        x: (..., d_in). For a stack: (groups, tokens, d_in), or (tokens, d_in) sorted by group with
            ``offsets``.
        values: (groups * d_out, d_in * N / M), in the dtype of ``x``, or fp32 with a 16-bit ``x``.
            Under autocast, any floating dtype.
        forward_mask: packed, uint8 (groups * d_out, ceil(d_in / 8)).
        backward_mask: packed, uint8 (groups * d_out, ceil(d_in * N / M / 8)).
        bias: (d_out,) or None. None for a stack.
        n, m: the N:M pattern.
        groups: number of weights; 1 for a plain weight.
        offsets: integers (groups,), the end of the rows of each group in ``x``. Rows after the
            last end have no group and give zeros. The offsets are read on the host.
        engine, input_engine, weight_engine: names of the engines of the product, its input
            gradient and its weight gradient. "": the fastest of ``engines``.
        engines: the allowed engines: "auto", or names separated by commas.
        master: the dense weight (d_out, d_in) that the values were made of, any floating dtype, or
            None. With it, ``grad_X = grad_Y W^R``, the values have no gradient, and the gradient
            of ``master`` is the whole ``grad_Y^T X``. Not for a stack.

    Returns:
        (..., d_out), (groups, tokens, d_out) or (tokens, d_out).
    """
    _check(x, values, bias, n, m, groups, offsets)
    product = ENGINES[engine or _choice("sparse_linear", x, values, n, m, groups, engines)]
    values = product.values_for(values, x.dtype)
    # A graph with gradients names the engines of the gradients.
    training = bool(input_engine or weight_engine)
    if grouped.is_plain(groups, offsets):
        return product.sparse_linear(x, values, forward_mask, bias, n, m, training)

    def one(rows: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        return product.sparse_linear(rows, of(values), of(forward_mask), None, n, m, training)

    return grouped.map_rows(one, x, values.shape[0] // groups, groups, offsets)


@sparse_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    groups: int = 1,
    offsets: Tensor | None = None,
    *others: str | Tensor | None,
) -> Tensor:
    _check(x, values, bias, n, m, groups, offsets)
    return x.new_empty((*x.shape[:-1], values.shape[0] // groups))


@torch.library.custom_op("slope_fx::sparse_input_grad", mutates_args=())
def sparse_input_grad(
    grad: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    n: int,
    m: int,
    groups: int = 1,
    offsets: Tensor | None = None,
    engine: str = "",
) -> Tensor:
    """``grad_X = grad_Y W^{R,C}``: maps (..., d_out) to (..., d_in)."""
    product = ENGINES[engine or _choice("sparse_input_grad", grad, values, n, m, groups, AUTO)]
    values = product.values_for(values, grad.dtype)
    if grouped.is_plain(groups, offsets):
        return product.sparse_input_grad(grad, values, forward_mask, backward_mask, n, m)

    def one(rows: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        masks = of(forward_mask), of(backward_mask)
        return product.sparse_input_grad(rows, of(values), *masks, n, m)

    return grouped.map_rows(one, grad, values.shape[1] * m // n, groups, offsets)


@sparse_input_grad.register_fake
def _(
    grad: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    n: int,
    m: int,
    groups: int = 1,
    offsets: Tensor | None = None,
    engine: str = "",
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], values.shape[1] * m // n))


@torch.library.custom_op("slope_fx::sparse_weight_grad", mutates_args=())
def sparse_weight_grad(
    grad: Tensor,
    x: Tensor,
    forward_mask: Tensor,
    n: int,
    m: int,
    groups: int = 1,
    offsets: Tensor | None = None,
    engine: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``grad_W = grad_Y^T X`` at the kept elements: (groups * d_out, d_in * N / M).

    ``dtype`` is the dtype of the result; None: the dtype of ``grad``. It is fp32 for fp32 values
    with 16-bit inputs: an engine that accepts such values does not round the sums to 16 bits.
    """
    d_out, kept = grad.shape[-1], x.shape[-1] * n // m
    shape = (groups * d_out, kept)
    if not engine:
        values = grad.new_empty(shape, dtype=dtype, device="meta")
        engine = _choice("sparse_weight_grad", grad, values, n, m, groups, AUTO)
    product = ENGINES[engine]
    if grouped.is_plain(groups, offsets):
        return product.sparse_weight_grad(grad, x, forward_mask, n, m, dtype)
    dw = grad.new_zeros(shape, dtype=dtype or grad.dtype)
    for group, rows in grouped.each(groups, offsets, grad):
        mask = grouped.of_stack(forward_mask, group, groups)
        part = product.sparse_weight_grad(grad[rows], x[rows], mask, n, m, dtype)
        grouped.of_stack(dw, group, groups).copy_(part)
    return dw


@sparse_weight_grad.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    forward_mask: Tensor,
    n: int,
    m: int,
    groups: int = 1,
    offsets: Tensor | None = None,
    engine: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    shape = (groups * grad.shape[-1], x.shape[-1] * n // m)
    return grad.new_empty(shape, dtype=dtype or grad.dtype)


def _check(
    x: Tensor, values: Tensor, bias: Tensor | None, n: int, m: int, groups: int,
    offsets: Tensor | None,
) -> None:  # fmt: skip
    """Check the operands, which an engine reads as memory of a known size."""
    d_in = values.shape[1] * m // n
    torch._check(
        x.shape[-1] == d_in,
        lambda: f"slope_fx::sparse_linear: x has {x.shape[-1]} features, the weight reads {d_in}",
    )
    torch._check(
        x.dtype == values.dtype or (values.dtype == torch.float32 and x.dtype.itemsize == 2),
        lambda: f"slope_fx::sparse_linear: x is {x.dtype}, the weight {values.dtype}",
    )
    if bias is None:
        return
    torch._check(
        grouped.is_plain(groups, offsets),
        lambda: "slope_fx::sparse_linear: a stack of weights takes no bias",
    )
    torch._check(
        bias.shape == values.shape[:1] and bias.dtype == x.dtype,
        lambda: (
            f"slope_fx::sparse_linear: the bias is {bias.dtype} {tuple(bias.shape)}, the output "
            f"{x.dtype} with {values.shape[0]} features"
        ),
    )


def _choice(
    op: str, tokens_of: Tensor, values: Tensor, n: int, m: int, groups: int, engines: str
) -> str:
    return choose(op, request_of(tokens_of, values, n, m, groups, engines=engines))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.numbers, offsets, ctx.engines = inputs[5:8], inputs[8], inputs[10:13]
    master = inputs[13] if len(inputs) > 13 else None
    ctx.master_dtype = None if master is None else master.dtype
    ctx.save_for_backward(*inputs[:4], offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, forward_mask, backward_mask, offsets = ctx.saved_tensors
    needs_x, needs_values, _, _, needs_bias, *others = ctx.needs_input_grad
    n, m, groups = ctx.numbers
    input_engine, weight_engine, engines = ctx.engines
    dx = dvalues = dbias = dmaster = None
    if ctx.master_dtype is not None:
        if needs_x:
            dx = grad @ expand(values, forward_mask, backward_mask, n, m)
        if others[-1]:
            rows, inputs = (t.unsqueeze(0) if t.dim() == 1 else t for t in (grad, x))
            dmaster = (rows.flatten(0, -2).mT @ inputs.flatten(0, -2)).to(ctx.master_dtype)
        needs_x = needs_values = False
    # Under torch.compile this runs when the backward graph is traced. A missing engine is chosen
    # then, and the graph contains its name.
    if needs_x:
        name = input_engine or _choice("sparse_input_grad", grad, values, n, m, groups, engines)
        masks = forward_mask, backward_mask
        dx = sparse_input_grad(grad, values, *masks, n, m, groups, offsets, name)
    if needs_values:
        name = weight_engine or _choice("sparse_weight_grad", grad, values, n, m, groups, engines)
        dtype = None if values.dtype == grad.dtype else values.dtype
        dvalues = sparse_weight_grad(grad, x, forward_mask, n, m, groups, offsets, name, dtype)
    if needs_bias:
        # Not reshaped to rows, which a DTensor with uneven shards can't be.
        rows = grad.unsqueeze(0) if grad.dim() == 1 else grad
        dbias = rows.sum(tuple(range(rows.dim() - 1)))
    return dx, dvalues, None, None, dbias, *[None] * (len(others) - 1), dmaster


sparse_linear.register_autograd(_backward, setup_context=_save)


def _autocast(
    dtype: torch.dtype,
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    groups: int = 1,
    offsets: Tensor | None = None,
    engine: str = "",
    input_engine: str = "",
    weight_engine: str = "",
    engines: str = AUTO,
    master: Tensor | None = None,
) -> tuple[Any, ...]:
    x = cast(x, dtype)
    bias = None if bias is None else cast(bias, dtype)
    # The engine is chosen here at the latest, because the dtype of the product is now known. The
    # tracer of torch.compile runs this code, so the graph contains this choice.
    engine = engine or _choice("sparse_linear", x, values, n, m, groups, engines)
    if values.dtype != torch.float64:
        # Cast here and not in the op, so that forward and backward share the cast values.
        values = ENGINES[engine].values_for(values, dtype)
    names = engine, input_engine, weight_engine, engines, master
    return x, values, forward_mask, backward_mask, bias, n, m, groups, offsets, *names


register_autocast(torch.ops.slope_fx.sparse_linear.default, _autocast)
