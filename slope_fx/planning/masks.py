"""A registry of methods that choose the forward mask of a weight.

A method is a function of the dense weight, the N:M pattern, and the calibration inputs if it needs
them. It returns scores, and the N largest scores of each group of M are kept. A method that does
not use scores returns a :class:`Chosen` with the mask, and with the weight if it updates that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slope_fx import ops
from slope_fx.errors import ArgumentError
from slope_fx.kernels.packing import pack, unpack
from slope_fx.planning.activations import Activations
from slope_fx.planning.draws import own_draws
from slope_fx.planning.patterns import Pattern
from slope_fx.planning.transposable import transposable_mask


@dataclass(frozen=True)
class Chosen:
    """The choice of a method for a weight.

    Attributes:
        bits: the packed forward mask, uint8 (stack * d_out, ceil(d_in / 8)).
        weight: the updated weight, in the shape of the given weight. The values are taken from it.
            None if the method does not update the weight.
    """

    bits: Tensor
    weight: Tensor | None = None


Method = Callable[[Tensor, Pattern, Activations | None], Tensor | Chosen]


@dataclass(frozen=True)
class MaskMethod:
    """An entry of the registry.

    Attributes:
        choose: maps the weight (stack, d_out, d_in), the pattern and the calibration inputs to
            scores in the shape of the weight, or to a :class:`Chosen`.
        needs_inputs: whether the method needs calibration inputs.
    """

    choose: Method
    needs_inputs: bool = False


MASK_METHODS: dict[str, MaskMethod] = {}
"""The methods by their names in ``mask=``."""


def mask_method(name: str, *, needs_inputs: bool = False) -> Callable[[Method], Method]:
    """Register a method under a name."""

    def register(function: Method) -> Method:
        MASK_METHODS[name] = MaskMethod(function, needs_inputs)
        return function

    return register


@mask_method("magnitude")
def magnitude(weight: Tensor, pattern: Pattern, inputs: Activations | None) -> Tensor:
    """Keep the largest magnitudes (METHOD, "Masks")."""
    return weight


@mask_method("wanda", needs_inputs=True)
def wanda(weight: Tensor, pattern: Pattern, inputs: Activations | None) -> Tensor:
    """Score |W_ij| |X_j|, with the norm of each input over the calibration tokens.

    Source: Wanda, arXiv 2306.11695. The paper compares scores within a row, as N:M groups do.
    """
    assert inputs is not None
    return weight.abs().float() * inputs.squares.sqrt().unsqueeze(-2)


@mask_method("transposable")
def transposable(weight: Tensor, pattern: Pattern, inputs: Activations | None) -> Chosen:
    """Keep large magnitudes, N of M along the rows and along the columns.

    The backward mask then drops nothing, and the input gradient is exact.
    """
    magnitudes = weight.reshape(-1, weight.shape[-1]).abs()
    return Chosen(pack(transposable_mask(magnitudes, pattern.n, pattern.m)))


@mask_method("random")
def random(weight: Tensor, pattern: Pattern, inputs: Activations | None) -> Tensor:
    """Keep N random elements of each group of M, with equal probability.

    The numbers are those of :func:`own_draws`.
    """
    return torch.rand(weight.shape, device=weight.device)


@torch.no_grad()
def choose_mask(
    mask: str | Callable[[str, Tensor], Tensor],
    name: str,
    weight: Tensor,
    pattern: Pattern,
    inputs: Activations | None = None,
) -> Chosen:
    """Returns the forward mask of a layer.

    Args:
        mask: the ``mask`` argument of ``compile``.
        name: name of the layer.
        weight: (d_out, d_in), or (stack, d_out, d_in).
        pattern: the N:M pattern.
        inputs: the calibration inputs of the layer, for a method that needs them.

    Raises:
        ArgumentError: the mask of a callable has a wrong type or shape, or is not N:M.
    """
    flat = weight.reshape(-1, weight.shape[-1])
    if callable(mask):
        return Chosen(_given(mask, name, weight, pattern))
    if mask not in MASK_METHODS:  # "callable", in a configuration from JSON
        raise ArgumentError(
            f"mask={mask!r} stands for a function in a stored configuration. Pass the function "
            "itself."
        )
    with own_draws(name, "mask", weight.device):
        found = MASK_METHODS[mask].choose(weight.view(-1, *weight.shape[-2:]), pattern, inputs)
    if isinstance(found, Chosen):
        return found
    return Chosen(ops.magnitude_mask(found.reshape(flat.shape), pattern.n, pattern.m))


def _given(
    mask: Callable[[str, Tensor], Tensor], name: str, weight: Tensor, pattern: Pattern
) -> Tensor:
    """The packed mask of a callable, checked."""
    chosen = mask(name, weight)
    where = f"mask({name!r}, weight)"
    if not isinstance(chosen, Tensor) or chosen.dtype is not torch.bool:
        got = chosen.dtype if isinstance(chosen, Tensor) else type(chosen).__name__
        raise ArgumentError(f"{where} returned {got}; it must return a torch.bool tensor.")
    if chosen.shape != weight.shape:
        raise ArgumentError(
            f"{where} returned shape {tuple(chosen.shape)}; it must be the weight's, "
            f"(d_out, d_in) = {tuple(weight.shape)}."
        )
    chosen = chosen.reshape(-1, weight.shape[-1]).contiguous()
    problem = mask_problem(chosen, pattern)
    if problem:
        raise ArgumentError(f"{where} isn't {pattern}: {problem}.")
    return pack(chosen.to(weight.device))


def mask_problem(mask: Tensor, pattern: Pattern) -> str:
    """The reason why a bool mask (d_out, d_in) is not N:M, or ""."""
    kept = mask.view(mask.shape[0], -1, pattern.m).sum(-1)
    wrong = (kept != pattern.n).nonzero()
    if not len(wrong):
        return ""
    row, group = wrong[0].tolist()
    return (
        f"the mask keeps {int(kept[row, group])} elements in group {group} of row {row} "
        f"({len(wrong)} such groups), where exactly {pattern.n} of each {pattern.m} are allowed"
    )


def packed_masks_problem(
    forward: Tensor, backward: Tensor | None, d_in: int, pattern: Pattern
) -> str:
    """The reason why packed masks are not N:M, or "".

    Args:
        forward: uint8 (d_out, ceil(d_in / 8)).
        backward: uint8 (d_out, ceil(d_in * N / M / 8)), or None.
        d_in: number of columns of the weight.
        pattern: the N:M pattern.
    """
    problem = mask_problem(unpack(forward, d_in), pattern)
    if problem:
        return f"forward_bits: {problem}"
    if backward is None:
        return ""
    kept = unpack(backward, d_in * pattern.n // pattern.m)
    both = ops.expand(kept.to(torch.uint8), forward, forward, pattern.n, pattern.m)
    columns = both.t().reshape(d_in, -1, pattern.m).sum(-1)
    if (columns > pattern.n).any():
        return f"backward_bits: the mask keeps more than {pattern.n} of {pattern.m} outputs"
    return ""
