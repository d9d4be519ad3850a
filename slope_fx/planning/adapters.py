"""Initial adapters: zero, or an approximation of the pruned part of a weight."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slope_fx.errors import ArgumentError
from slope_fx.planning.activations import Activations
from slope_fx.planning.config import CALLABLE, AdapterInit
from slope_fx.planning.draws import own_draws


@dataclass(frozen=True)
class Adapter:
    """The factors and the scale of the adapter of one layer.

    Attributes:
        lora_A: (stack * r, d_in).
        lora_B: (stack * d_out, r).
        scale: factor of the product B A.
        active: whether the adapter is active from the first step.
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
    mask: Tensor | None,
    rank: int,
    activations: Activations | None,
) -> Adapter:
    """Returns the initial adapter of one layer.

    Args:
        adapter_init: "zero": A from N(0, 1), by :func:`own_draws`, and B = 0, so that the adapter
            adds nothing (METHOD, "Lazy adapters"). "svd": the best approximation with rank r of the
            pruned part of the weight, in the Frobenius norm. "eora": the best approximation with
            rank r of the contribution of the pruned part to the outputs over the calibration inputs
            (EoRA, arXiv 2410.21271). A callable (name, weight, mask, rank) -> (A, B): B A is added
            to the pruned weight.
        name: name of the layer.
        weight: the dense weight, (d_out, d_in) or (stack, d_out, d_in).
        mask: the kept elements, bool, in the shape of ``weight``. "zero" needs none.
        rank: rank of the adapter.
        activations: the calibration sums of the layer, for "eora".

    Raises:
        ArgumentError: the pruned part has NaN or inf, or the factors of a callable have a wrong
            type, shape or value.
    """
    if adapter_init == CALLABLE:
        raise ArgumentError(
            f"adapter_init={adapter_init!r} stands for a function in a stored configuration. Pass "
            "the function itself."
        )
    d_out, d_in = weight.shape[-2:]
    scale = 1.0 / rank  # alpha / r, with alpha = 1
    weight = weight.reshape(-1, d_out, d_in)
    stack = len(weight)
    if adapter_init == "zero":
        with own_draws(name, "adapter", weight.device):
            a = weight.new_empty(stack * rank, d_in).normal_()
        return Adapter(a, weight.new_zeros(stack * d_out, rank), scale, False)
    assert mask is not None
    mask, factors = mask.reshape(-1, d_out, d_in), []
    for i in range(stack):
        if callable(adapter_init):
            factors.append(_checked(adapter_init, name, weight[i], mask[i], rank))
            continue
        pruned = weight[i].float().masked_fill(mask[i], 0.0)
        if not pruned.isfinite().all():
            raise ArgumentError(
                f"adapter_init={adapter_init!r}: the pruned part of {name} has NaN or inf. Use "
                'adapter_init="zero", or keep the layer dense.'
            )
        gram = None if adapter_init == "svd" or activations is None else activations.gram
        a, b = low_rank(pruned, rank, None if gram is None else gram[i])
        factors.append((a, b))
    a = torch.cat([factor[0] for factor in factors])
    b = torch.cat([factor[1] for factor in factors])
    # scale * B A must equal the product of the factors. The scale is divided out of both factors
    # equally, so that they learn at the same speed.
    share = scale**-0.5
    return Adapter((a * share).to(weight.dtype), (b * share).to(weight.dtype), scale, True)


def low_rank(matrix: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors A, B of the best approximation B A of ``matrix``, with balanced norms.

    Args:
        matrix: (d_out, d_in).
        rank: rank of the product.
        gram: sum of x x^T over the inputs, (d_in, d_in). The result then minimizes the norm of
            (matrix - B A) x over the inputs; without ``gram``, the Frobenius norm of
            matrix - B A.

    Returns:
        A (rank, d_in) and B (d_out, rank).
    """
    if gram is None:
        u, s, vh = _largest(matrix, rank)
        root = s.sqrt()
        return root[:, None] * vh, u * root
    # With gram = Q diag(e) Q^T, |M x|^2 sums to |M Q diag(e)^(1/2)|^2. So the matrix is projected,
    # approximated, and projected back. Eigenvalues have a small lower bound, so that the inverse
    # projection exists.
    values, q = torch.linalg.eigh(gram.double())
    values = values.clamp_min(values.max().clamp_min(1e-30) * 1e-8)
    forth = (q * values.sqrt()).to(matrix.dtype)
    back = (q / values.sqrt()).to(matrix.dtype)
    b, s, vh = _largest(matrix @ forth, rank)
    a = s[:, None] * (vh @ back.t())
    # Balance the norms of each component. The product does not change.
    root = (b.norm(dim=0) / a.norm(dim=1).clamp_min(1e-30)).sqrt()
    return a * root[:, None], b / root.clamp_min(1e-30)


def _largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values, (rank,), between their vectors (d_out, rank) and (rank, d_in).

    By the eigenvectors of the smaller Gram matrix, in float64: of 2048 x 8192 this takes three
    seconds on two cores, where the decomposition of the matrix takes 36.
    """
    wide = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = _largest(matrix.t(), rank)
        return vh.t(), s, u.t()
    values, vectors = torch.linalg.eigh(wide @ wide.t())
    u, s = vectors[:, -rank:].flip(1), values[-rank:].flip(0).clamp_min(0).sqrt()
    vh = u.t() @ wide / s.clamp_min(1e-30)[:, None]
    return u.to(matrix.dtype), s.to(matrix.dtype), vh.to(matrix.dtype)


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
