"""What the adapters start from: nothing, or an approximation of what was pruned."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slope_fx.errors import ArgumentError
from slope_fx.planning.activations import Activations
from slope_fx.planning.config import CALLABLE, AdapterInit


@dataclass(frozen=True)
class Adapter:
    """The two factors of one layer's adapter, and their scale.

    Attributes:
        lora_A: (stack * r, d_in).
        lora_B: (stack * d_out, r).
        scale: what their product is multiplied by.
        active: whether it takes part from the start.
    """

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    scale: float
    active: bool


@torch.no_grad()
def make_adapter(
    adapter_init: AdapterInit,
    name: str,
    weight: Tensor,
    mask: Tensor,
    rank: int,
    activations: Activations | None,
) -> Adapter:
    """The adapter of one layer, in its first state.

    Args:
        adapter_init: "zero": A from N(0, 1) and B zero, so that it adds nothing (METHOD, "Lazy
            adapters"). "svd": the best approximation of rank r, by Frobenius norm, of what was
            pruned. "eora": of what that adds to the layer's outputs over the calibration inputs
            (EoRA, arXiv 2410.21271). A callable (name, weight, mask, rank) -> (A, B): B A is
            added to the pruned weight.
        name: the layer's.
        weight: dense, (d_out, d_in) or (stack, d_out, d_in).
        mask: bool, shaped like it: what is kept.
        rank: of the adapter.
        activations: the layer's, for "eora".

    Raises:
        ArgumentError: a callable's factors have the wrong type, shape or values.
    """
    if adapter_init == CALLABLE:
        raise ArgumentError(
            f"adapter_init={adapter_init!r} stands for a function of the run that made the "
            "configuration. Pass the function itself."
        )
    d_out, d_in = weight.shape[-2:]
    scale = 1.0 / rank  # alpha / r, with alpha = 1
    weight, mask = weight.reshape(-1, d_out, d_in), mask.reshape(-1, d_out, d_in)
    stack = len(weight)
    if adapter_init == "zero":
        a = weight.new_empty(stack * rank, d_in).normal_()
        return Adapter(a, weight.new_zeros(stack * d_out, rank), scale, False)
    factors = []
    for i in range(stack):
        if callable(adapter_init):
            factors.append(_checked(adapter_init, name, weight[i], mask[i], rank))
            continue
        pruned = weight[i].float().masked_fill(mask[i], 0.0)
        if not pruned.isfinite().all():
            raise ArgumentError(
                f"adapter_init={adapter_init!r}: what was pruned of {name} has NaN or inf. Use "
                'adapter_init="zero", or keep the layer dense.'
            )
        gram = None if adapter_init == "svd" or activations is None else activations.gram
        a, b = low_rank(pruned, rank, None if gram is None else gram[i])
        factors.append((a, b))
    a = torch.cat([factor[0] for factor in factors])
    b = torch.cat([factor[1] for factor in factors])
    # B A is what is to be added; the scale is taken out of both alike, so that neither learns
    # faster than the other.
    share = scale**-0.5
    return Adapter((a * share).to(weight.dtype), (b * share).to(weight.dtype), scale, True)


def low_rank(matrix: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors A, B whose product B A is nearest to ``matrix``, with norms shared evenly.

    Args:
        matrix: (d_out, d_in).
        rank: of the product.
        gram: (d_in, d_in), of the inputs: nearest then means for (matrix - B A) x over the inputs
            that it was summed over, and is ``matrix``'s own Frobenius norm without it.

    Returns:
        A (rank, d_in) and B (d_out, rank).
    """
    if gram is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        root = s[:rank].sqrt()
        return root[:, None] * vh[:rank], u[:, :rank] * root
    # With gram = Q diag(e) Q^T, |M x|^2 sums to |M Q diag(e)^(1/2)|^2: project, approximate
    # there, project back. Directions that no input has are kept, barely, so that the way back
    # exists.
    values, q = torch.linalg.eigh(gram.double())
    values = values.clamp_min(values.max().clamp_min(1e-30) * 1e-8)
    forth = (q * values.sqrt()).to(matrix.dtype)
    back = (q / values.sqrt()).to(matrix.dtype)
    u, s, vh = torch.linalg.svd(matrix @ forth, full_matrices=False)
    a, b = s[:rank, None] * (vh[:rank] @ back.t()), u[:, :rank]
    # One scale a component, which leaves the product as it is.
    root = (b.norm(dim=0) / a.norm(dim=1).clamp_min(1e-30)).sqrt()
    return a * root[:, None], b / root.clamp_min(1e-30)


def _checked(
    function: Callable[[str, Tensor, Tensor, int], tuple[Tensor, Tensor]],
    name: str,
    weight: Tensor,
    mask: Tensor,
    rank: int,
) -> tuple[Tensor, Tensor]:
    made = function(name, weight, mask, rank)
    d_out, d_in = weight.shape
    where = f"adapter_init({name!r}, weight, mask, {rank})"
    good = isinstance(made, (tuple, list)) and len(made) == 2
    if not good or not all(isinstance(factor, Tensor) for factor in made):
        raise ArgumentError(f"{where} returned {type(made).__name__}; it must return (A, B).")
    shapes = [tuple(factor.shape) for factor in made]
    if shapes != [(rank, d_in), (d_out, rank)]:
        raise ArgumentError(
            f"{where} returned shapes {shapes}; they must be A (r, d_in) = {(rank, d_in)} and B "
            f"(d_out, r) = {(d_out, rank)}."
        )
    a, b = (factor.detach().to(weight.device, torch.float32) for factor in made)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ArgumentError(f"{where} returned NaN or inf.")
    return a, b
