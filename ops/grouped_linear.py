"""A stack of pruned weights, each times its own rows of the input: the experts of a mixture.

Each weight of the stack is (d_out, d_in), pruned by itself; their values and masks lie one below
the other, so that those of one are whole rows.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slope_fx.kernels import selection
from slope_fx.kernels.engines import AUTO, ENGINES
from slope_fx.ops.autocast import cast, register_autocast
from slope_fx.ops.dispatch import request_of


@torch.library.custom_op("slope_fx::sparse_grouped_linear", mutates_args=())
def sparse_grouped_linear(
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    offsets: Tensor | None,
    groups: int,
    n: int,
    m: int,
    engine: str = "",
    input_engine: str = "",
    weight_engine: str = "",
    engines: str = AUTO,
) -> Tensor:
    """``Y_g = X_g (W_g^R)^T`` for each group g, with the gradients of :func:`sparse_linear`.

    Args:
        x: (groups, tokens, d_in); or (tokens, d_in), sorted by group, with ``offsets``.
        values: (groups * d_out, d_in * N / M).
        forward_mask: packed, uint8 (groups * d_out, ceil(d_in / 8)).
        backward_mask: packed, uint8 (groups * d_out, ceil(d_in * N / M / 8)).
        offsets: integers (groups,): where each group's rows of ``x`` end. Rows after the last
            belong to none, and give zeros. Read on the host, as its sizes must be known there.
        groups: how many weights.
        n, m: the pattern.
        engine, input_engine, weight_engine, engines: as of :func:`sparse_linear`.

    Returns:
        (groups, tokens, d_out), or (tokens, d_out).
    """
    d_out = values.shape[0] // groups
    engine = engine or _choose("sparse_linear", x, values, groups, n, m, engines)
    by = ENGINES[engine]
    y = x.new_empty(*x.shape[:-1], d_out)
    end = 0
    for group, mine, of_y in _parts(groups, offsets, x, y):
        kept = _rows(values, group, groups)
        kept = by.values_for(kept, x.dtype)
        of_y.copy_(by.sparse_linear(mine, kept, _rows(forward_mask, group, groups), None, n, m))
        end += mine.shape[0]
    _clear_rest(y, end, offsets)
    return y


@sparse_grouped_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    offsets: Tensor | None,
    groups: int,
    n: int,
    m: int,
    engine: str = "",
    input_engine: str = "",
    weight_engine: str = "",
    engines: str = AUTO,
) -> Tensor:
    d_in = values.shape[1] * m // n
    torch._check(
        x.shape[-1] == d_in,
        lambda: (
            f"slope_fx::sparse_grouped_linear: x has {x.shape[-1]} features, the weights "
            f"read {d_in}"
        ),
    )
    return x.new_empty((*x.shape[:-1], values.shape[0] // groups))


@torch.library.custom_op("slope_fx::sparse_grouped_input_grad", mutates_args=())
def sparse_grouped_input_grad(
    grad: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    offsets: Tensor | None,
    groups: int,
    n: int,
    m: int,
    engine: str = "",
) -> Tensor:
    """``grad_X_g = grad_Y_g W_g^{R,C}``: (..., d_out) to (..., d_in)."""
    engine = engine or _choose("sparse_input_grad", grad, values, groups, n, m, AUTO)
    by = ENGINES[engine]
    dx = grad.new_empty(*grad.shape[:-1], values.shape[1] * m // n)
    end = 0
    for group, mine, of_dx in _parts(groups, offsets, grad, dx):
        kept, forward, backward = (
            _rows(t, group, groups) for t in (values, forward_mask, backward_mask)
        )
        kept = by.values_for(kept, grad.dtype)
        of_dx.copy_(by.sparse_input_grad(mine, kept, forward, backward, n, m))
        end += mine.shape[0]
    _clear_rest(dx, end, offsets)
    return dx


@sparse_grouped_input_grad.register_fake
def _(
    grad: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    offsets: Tensor | None,
    groups: int,
    n: int,
    m: int,
    engine: str = "",
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], values.shape[1] * m // n))


@torch.library.custom_op("slope_fx::sparse_grouped_weight_grad", mutates_args=())
def sparse_grouped_weight_grad(
    grad: Tensor,
    x: Tensor,
    forward_mask: Tensor,
    offsets: Tensor | None,
    groups: int,
    n: int,
    m: int,
    engine: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``grad_W_g = grad_Y_g^T X_g`` where kept: (groups * d_out, d_in * N / M), in ``dtype``."""
    d_out, kept = grad.shape[-1], x.shape[-1] * n // m
    if not engine:
        size = (d_out, kept)
        request = request_of(grad, size, n, m, groups)
        engine = selection.choose("sparse_weight_grad", request)
    by = ENGINES[engine]
    dw = grad.new_zeros(groups * d_out, kept, dtype=dtype or grad.dtype)
    for group, of_grad, of_x in _parts(groups, offsets, grad, x):
        part = by.sparse_weight_grad(of_grad, of_x, _rows(forward_mask, group, groups), n, m)
        _rows(dw, group, groups).copy_(part)
    return dw


@sparse_grouped_weight_grad.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    forward_mask: Tensor,
    offsets: Tensor | None,
    groups: int,
    n: int,
    m: int,
    engine: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    shape = (groups * grad.shape[-1], x.shape[-1] * n // m)
    return grad.new_empty(shape, dtype=dtype or grad.dtype)


def _parts(
    groups: int, offsets: Tensor | None, first: Tensor, second: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each group that has rows, with its rows of both tensors."""
    if offsets is None:
        for group in range(groups):
            if first.shape[1]:
                yield group, first[group], second[group]
        return
    start = 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            yield group, first[start:end], second[start:end]
            start = end


def _clear_rest(tensor: Tensor, end: int, offsets: Tensor | None) -> None:
    if offsets is not None and end < tensor.shape[0]:
        tensor[end:].zero_()


def _rows(stacked: Tensor, group: int, groups: int) -> Tensor:
    each = stacked.shape[0] // groups
    return stacked[group * each : (group + 1) * each]


def _choose(
    op: str, tokens_of: Tensor, values: Tensor, groups: int, n: int, m: int, engines: str
) -> str:
    size = (values.shape[0] // groups, values.shape[1])
    request = request_of(tokens_of, size, n, m, groups, engines=engines)
    return selection.choose(op, request)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, forward_mask, backward_mask, offsets, *numbers = inputs
    ctx.groups, ctx.n, ctx.m, _, *ctx.engines = numbers
    ctx.save_for_backward(x, values, forward_mask, backward_mask, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, forward_mask, backward_mask, offsets = ctx.saved_tensors
    groups, n, m = ctx.groups, ctx.n, ctx.m
    input_engine, weight_engine, engines = ctx.engines
    dx = dvalues = None
    if ctx.needs_input_grad[0]:
        engine = input_engine or _choose("sparse_input_grad", grad, values, groups, n, m, engines)
        dx = sparse_grouped_input_grad(
            grad, values, forward_mask, backward_mask, offsets, groups, n, m, engine
        )
    if ctx.needs_input_grad[1]:
        engine = weight_engine or _choose("sparse_weight_grad", grad, values, groups, n, m, engines)
        dtype = None if values.dtype == grad.dtype else values.dtype
        dvalues = sparse_grouped_weight_grad(
            grad, x, forward_mask, offsets, groups, n, m, engine, dtype
        )
    return dx, dvalues, *[None] * 10


sparse_grouped_linear.register_autograd(_backward, setup_context=_save)


def _autocast(
    dtype: torch.dtype,
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    offsets: Tensor | None,
    groups: int,
    n: int,
    m: int,
    engine: str = "",
    input_engine: str = "",
    weight_engine: str = "",
    engines: str = AUTO,
) -> tuple[Any, ...]:
    return (
        cast(x, dtype), cast(values, dtype), forward_mask, backward_mask, offsets, groups, n, m,
        engine, input_engine, weight_engine, engines,
    )  # fmt: skip


register_autocast(torch.ops.slope_fx.sparse_grouped_linear.default, _autocast)
