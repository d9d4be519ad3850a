"""``add_adapter``: the marker of a weight in its adapter phase."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("slope_fx::add_adapter", mutates_args=())
def add_adapter(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``W + scale * B A``.

    A marker: ``passes/insert_adapters.py`` turns a linear over it into the low-rank
    branch ``scale * (x A^T) B^T`` beside the product, so that the dense ``B A`` is made
    only for code that no pass understands.

    Args:
        weight: (d_out, d_in).
        lora_a: (r, d_in).
        lora_b: (d_out, r).
        scale: alpha / r.

    Returns:
        (d_out, d_in), in the dtype of ``weight``.
    """
    return torch.add(weight, lora_b @ lora_a, alpha=scale)


@add_adapter.register_fake
def _(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    return torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, lora_a, lora_b, ctx.scale = inputs
    ctx.save_for_backward(lora_a, lora_b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    lora_a, lora_b = ctx.saved_tensors
    grad_a = ctx.scale * (lora_b.t() @ grad)
    grad_b = ctx.scale * (grad @ lora_a.t())
    # A marker's output may not alias its input, nor may its gradient.
    return grad.clone(), grad_a, grad_b, None


add_adapter.register_autograd(_backward, setup_context=_save)
