"""The linear of a pruned weight, with the double-pruned gradient (METHOD, "The three products")."""

from typing import Any

import torch
from torch import Tensor

from slope_fx.kernels import selection
from slope_fx.kernels.engines import AUTO, ENGINES
from slope_fx.ops.autocast import cast, register_autocast
from slope_fx.ops.dispatch import request_of


@torch.library.custom_op("slope_fx::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    engine: str = "",
    input_engine: str = "",
    weight_engine: str = "",
    engines: str = AUTO,
) -> Tensor:
    """``Y = X (W^R)^T + b``, with ``grad_X = grad_Y W^{R,C}`` and a compressed ``grad_W``.

    Source: SLoPe, arXiv 2405.16325, equations 4 to 6.

    Args:
        x: (..., d_in).
        values: (d_out, d_in * N / M), the dtype of ``x``, or fp32 beside 16-bit ``x``; under
            autocast, any floating dtype.
        forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
        backward_mask: packed, uint8 (d_out, ceil(d_in * N / M / 8)).
        bias: (d_out,) or None.
        n, m: the pattern.
        engine, input_engine, weight_engine: what computes it, its input gradient and its
            weight gradient, by name; "" for whatever of ``engines`` proves fastest.
        engines: "auto", or names separated by commas.

    Returns:
        (..., d_out).
    """
    engine = engine or choose("sparse_linear", x, values, n, m, engines)
    # A graph that trains names the engines of its gradients too.
    training = bool(input_engine or weight_engine)
    by = ENGINES[engine]
    return by.sparse_linear(x, by.values_for(values, x.dtype), forward_mask, bias, n, m, training)


def choose(op: str, tokens_of: Tensor, values: Tensor, n: int, m: int, engines: str) -> str:
    size = (values.shape[0], values.shape[1])
    request = request_of(tokens_of, size, n, m, values_dtype=values.dtype, engines=engines)
    return selection.choose(op, request)


@sparse_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    bias: Tensor | None,
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
        lambda: f"slope_fx::sparse_linear: x has {x.shape[-1]} features, the weight reads {d_in}",
    )
    torch._check(
        x.dtype == values.dtype or (values.dtype == torch.float32 and x.dtype.itemsize == 2),
        lambda: f"slope_fx::sparse_linear: x is {x.dtype}, the weight {values.dtype}",
    )
    return x.new_empty((*x.shape[:-1], values.shape[0]))


@torch.library.custom_op("slope_fx::sparse_input_grad", mutates_args=())
def sparse_input_grad(
    grad: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    n: int,
    m: int,
    engine: str = "",
) -> Tensor:
    """``grad_X = grad_Y W^{R,C}``: (..., d_out) to (..., d_in)."""
    engine = engine or choose("sparse_input_grad", grad, values, n, m, AUTO)
    by = ENGINES[engine]
    values = by.values_for(values, grad.dtype)
    return by.sparse_input_grad(grad, values, forward_mask, backward_mask, n, m)


@sparse_input_grad.register_fake
def _(
    grad: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    n: int,
    m: int,
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
    engine: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``grad_W = grad_Y^T X`` at the forward mask's positions: (d_out, d_in * N / M).

    ``dtype`` is that of the result if it isn't that of ``grad``: of fp32 values, whose gradient
    an engine that takes them doesn't round to 16 bits in between.
    """
    size = (grad.shape[-1], x.shape[-1] * n // m)
    engine = engine or selection.choose("sparse_weight_grad", request_of(grad, size, n, m))
    return ENGINES[engine].sparse_weight_grad(grad, x, forward_mask, n, m, dtype)


@sparse_weight_grad.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    forward_mask: Tensor,
    n: int,
    m: int,
    engine: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    return grad.new_empty((grad.shape[-1], x.shape[-1] * n // m), dtype=dtype or grad.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, forward_mask, backward_mask, _, ctx.n, ctx.m, _, *ctx.engines = inputs
    ctx.save_for_backward(x, values, forward_mask, backward_mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, forward_mask, backward_mask = ctx.saved_tensors
    needs_x, needs_values, _, _, needs_bias, *_ = ctx.needs_input_grad
    n, m = ctx.n, ctx.m
    input_engine, weight_engine, engines = ctx.engines
    dx = dvalues = dbias = None
    # Under torch.compile this runs while the backward graph is traced, so that what isn't
    # chosen yet is chosen then, and the graph has its name.
    if needs_x:
        engine = input_engine or choose("sparse_input_grad", grad, values, n, m, engines)
        dx = sparse_input_grad(grad, values, forward_mask, backward_mask, n, m, engine)
    if needs_values:
        engine = weight_engine or choose("sparse_weight_grad", grad, values, n, m, engines)
        dtype = None if values.dtype == grad.dtype else values.dtype
        dvalues = sparse_weight_grad(grad, x, forward_mask, n, m, engine, dtype)
    if needs_bias:
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return dx, dvalues, None, None, dbias, *[None] * 6


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
    engine: str = "",
    input_engine: str = "",
    weight_engine: str = "",
    engines: str = AUTO,
) -> tuple[Any, ...]:
    x = cast(x, dtype)
    bias = None if bias is None else cast(bias, dtype)
    # Chosen here at the latest, for the dtype that the product now has. The tracer of
    # torch.compile passes here too, so that this choice is the one in the graph.
    engine = engine or choose("sparse_linear", x, values, n, m, engines)
    values = autocast_values(values, dtype, engine)
    return (
        x, values, forward_mask, backward_mask, bias, n, m,
        engine, input_engine, weight_engine, engines,
    )  # fmt: skip


def autocast_values(values: Tensor, dtype: torch.dtype, engine: str) -> Tensor:
    """The values as autocast hands them to an engine."""
    # Here rather than in the op, so that forward and backward share the cast values.
    return values if values.dtype == torch.float64 else ENGINES[engine].values_for(values, dtype)


register_autocast(torch.ops.slope_fx.sparse_linear.default, _autocast)
