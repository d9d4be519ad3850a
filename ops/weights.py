"""``expand`` and ``compress``: between kept values and the dense weight."""

from typing import Any

import torch
from torch import Tensor

from slope_fx.ops.dispatch import engine


@torch.library.custom_op("slope_fx::compress", mutates_args=())
def compress(dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """The kept values of a dense weight.

    Args:
        dense: (d_out, d_in).
        forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
        n, m: the pattern.

    Returns:
        (d_out, d_in * N / M), in the order of the columns.
    """
    values: Tensor = engine(dense).compress(dense, forward_mask, n, m)
    return values


@compress.register_fake
def _(dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    return dense.new_empty((dense.shape[0], dense.shape[1] * n // m))


@torch.library.custom_op("slope_fx::expand", mutates_args=())
def expand(values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int) -> Tensor:
    """The dense ``W^R``; its gradient comes back compressed.

    This is the marker that a model's ``weight`` reads as. The passes turn a linear
    over it into :func:`sparse_linear`; anything else that uses it is right, but pays
    for the dense weight and gets the gradient of ``W^R`` instead of ``W^{R,C}``.

    Args:
        values: (d_out, d_in * N / M).
        forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
        backward_mask: packed, uint8 (d_out, ceil(d_in * N / M / 8)). Not read here:
            the passes take it from the marker.
        n, m: the pattern.

    Returns:
        (d_out, d_in), zero where pruned.
    """
    dense: Tensor = engine(values).expand(values, forward_mask, n, m)
    return dense


@expand.register_fake
def _(values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int) -> Tensor:
    return values.new_empty((values.shape[0], values.shape[1] * m // n))


def _save_for_expand(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, forward_mask, _, ctx.n, ctx.m = inputs
    ctx.save_for_backward(forward_mask)


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (forward_mask,) = ctx.saved_tensors
    return compress(grad, forward_mask, ctx.n, ctx.m), None, None, None, None


expand.register_autograd(_expand_backward, setup_context=_save_for_expand)


def _save_for_compress(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, forward_mask, ctx.n, ctx.m = inputs
    ctx.save_for_backward(forward_mask)


def _compress_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The two ops are each other's gradient, so either can be differentiated again.
    (forward_mask,) = ctx.saved_tensors
    return expand(grad, forward_mask, forward_mask, ctx.n, ctx.m), None, None, None


compress.register_autograd(_compress_backward, setup_context=_save_for_compress)
