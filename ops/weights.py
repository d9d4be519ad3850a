"""``expand`` and ``compress``: conversions between the kept values and the dense weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slope_fx.ops.dispatch import engine, refuse_onnx


@torch.library.custom_op("slope_fx::compress", mutates_args=())
def compress(dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """Returns the kept values of a dense weight.

    Args:
        dense: (d_out, d_in).
        forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
        n, m: the N:M pattern.

    Returns:
        (d_out, d_in * N / M), in the order of the columns.
    """
    values: Tensor = engine(dense).compress(dense, forward_mask, n, m)
    return values


@compress.register_fake
def _(dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    return dense.new_empty((dense.shape[0], dense.shape[1] * n // m))


def _save_for_compress(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, forward_mask, ctx.n, ctx.m = inputs
    ctx.save_for_backward(forward_mask)


def _compress_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (forward_mask,) = ctx.saved_tensors
    return expand(grad.contiguous(), forward_mask, forward_mask, ctx.n, ctx.m), None, None, None


compress.register_autograd(_compress_backward, setup_context=_save_for_compress)


@torch.library.custom_op("slope_fx::expand", mutates_args=())
def expand(
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    n: int,
    m: int,
    master: Tensor | None = None,
) -> Tensor:
    """Returns the dense ``W^R``. Its gradient is compressed to the values.

    This is the marker of a model's ``weight``. The passes rewrite a linear with it to
    :func:`sparse_linear`. Other code with it is correct, but computes the dense weight, and its
    input gradient is that of ``W^R`` instead of ``W^{R,C}``.

    Args:
        values: (d_out, d_in * N / M).
        forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
        backward_mask: packed, uint8 (d_out, ceil(d_in * N / M / 8)). The op does not read it; the
            passes do.
        n, m: the N:M pattern.
        master: the dense weight (d_out, d_in) that the values were made of, or None. It gets the
            whole gradient of the result, and the values get none.

    Returns:
        (d_out, d_in). Pruned elements are zero.
    """
    dense: Tensor = engine(values).expand(values, forward_mask, n, m)
    return dense


@expand.register_fake
def _(
    values: Tensor,
    forward_mask: Tensor,
    backward_mask: Tensor,
    n: int,
    m: int,
    master: Tensor | None = None,
) -> Tensor:
    refuse_onnx()
    return values.new_empty((values.shape[0], values.shape[1] * m // n))


expand_grad_observers: list[Callable[[Tensor], None]] = []
"""Functions of a layer's packed forward mask, called when a gradient of ``expand`` is computed. The
layer then trains expanded, however the model is compiled."""


@torch.library.custom_op("slope_fx::expand_grad", mutates_args=())
def expand_grad(grad: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """Returns the gradient of :func:`expand`: :func:`compress`, with calls of the observers.

    Args:
        grad: gradient of the dense weight, (d_out, d_in).
        forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
        n, m: the N:M pattern.

    Returns:
        (d_out, d_in * N / M).
    """
    for observer in expand_grad_observers:
        observer(forward_mask)
    values: Tensor = engine(grad).compress(grad, forward_mask, n, m)
    return values


@expand_grad.register_fake
def _(grad: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    return grad.new_empty((grad.shape[0], grad.shape[1] * n // m))


def _save_for_expand(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, forward_mask, _, ctx.n, ctx.m, *master = inputs
    ctx.has_master = bool(master) and master[0] is not None
    ctx.save_for_backward(forward_mask)


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (forward_mask,) = ctx.saved_tensors
    if ctx.has_master:
        return None, None, None, None, None, grad
    return expand_grad(grad, forward_mask, ctx.n, ctx.m), None, None, None, None, None


expand.register_autograd(_expand_backward, setup_context=_save_for_expand)


@torch.library.custom_op("slope_fx::expand_with_probe", mutates_args=())
def expand_with_probe(
    values: Tensor, probe: Tensor, forward_mask: Tensor, n: int, m: int
) -> Tensor:
    """Returns the dense ``W^R``, with gradients of the kept and of the pruned elements.

    No pass rewrites a linear with it, so all its products are dense.

    Args:
        values: (d_out, d_in * N / M).
        probe: (d_out, d_in * (M - N) / M). It is not read. Its gradient is that of the pruned
            elements, in the order of the columns.
        forward_mask: packed, uint8 (d_out, ceil(d_in / 8)).
        n, m: the N:M pattern.

    Returns:
        (d_out, d_in). Pruned elements are zero.
    """
    dense: Tensor = engine(values).expand(values, forward_mask, n, m)
    return dense


@expand_with_probe.register_fake
def _(values: Tensor, probe: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    return values.new_empty((values.shape[0], values.shape[1] * m // n))


def _save_for_probe(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, forward_mask, ctx.n, ctx.m = inputs
    ctx.save_for_backward(forward_mask)


def _probe_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (forward_mask,) = ctx.saved_tensors
    grad, n, m = grad.contiguous(), ctx.n, ctx.m
    pruned = ~forward_mask
    if grad.shape[1] % 8:  # the rest of the last byte stays zero
        last = [255] * (pruned.shape[1] - 1) + [2 ** (grad.shape[1] % 8) - 1]
        pruned = pruned & pruned.new_tensor(last)
    of_values = compress(grad, forward_mask, n, m)
    return of_values, compress(grad, pruned, m - n, m), None, None, None


expand_with_probe.register_autograd(_probe_backward, setup_context=_save_for_probe)
