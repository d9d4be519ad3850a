"""``add_adapter``: the marker of a weight with an active adapter."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("slope_fx::add_adapter", mutates_args=())
def add_adapter(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``W + scale * B A``, for one weight or for each weight of a stack.

    This is a marker. The pass ``insert_adapters`` rewrites a linear with it to the low-rank branch
    ``scale * (x A^T) B^T``. The dense ``B A`` is computed only in code that no pass rewrites.

    Args:
        weight: (stack * d_out, d_in).
        lora_a: (stack * r, d_in).
        lora_b: (stack * d_out, r).
        scale: alpha / r.

    Returns:
        (stack * d_out, d_in), in the dtype of ``weight``.
    """
    rank = lora_b.shape[1]
    product = torch.bmm(_stack(lora_b, lora_a, rank), lora_a.unflatten(0, (-1, rank)))
    return torch.add(weight, product.flatten(0, 1), alpha=scale)


def _stack(tensor: Tensor, lora_a: Tensor, rank: int) -> Tensor:
    """The rows of ``tensor``, grouped by the weights of the stack."""
    return tensor.unflatten(0, (lora_a.shape[0] // rank, -1))


@add_adapter.register_fake
def _(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    return torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, lora_a, lora_b, ctx.scale = inputs
    ctx.save_for_backward(lora_a, lora_b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    lora_a, lora_b = ctx.saved_tensors
    rank = lora_b.shape[1]
    a, b, g = lora_a.unflatten(0, (-1, rank)), *(_stack(t, lora_a, rank) for t in (lora_b, grad))
    grad_a = ctx.scale * (b.mT @ g).flatten(0, 1)
    grad_b = ctx.scale * (g @ a.mT).flatten(0, 1)
    # The output of a custom op must not alias its inputs, nor must its gradient.
    return grad.clone(), grad_a, grad_b, None


add_adapter.register_autograd(_backward, setup_context=_save)
