"""Excludes masks from averages of weights.

Masks are parameters, so that FSDP shards them with the values. ``AveragedModel`` of torch averages
all parameters, and an average of packed bits is not a mask. This module patches
``AveragedModel.update_parameters``: masks are removed from the models during the update. The
averaged model has the forward masks of the model, or chooses them from its averaged dense weights.
Then it chooses backward masks from its averaged values.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from slope_fx.ops.dispatch import local
from slope_fx.sparse.steps import move_values
from slope_fx.sparse.weight import SparseWeight


@contextmanager
def masks_set_aside(*models: nn.Module) -> Iterator[None]:
    """Removes the masks of sparse weights from the parameters of the models in a ``with`` block."""
    weights = [weight for model in models for weight in _weights(model)]
    kept = [weight._parameters for weight in weights]
    try:
        for weight in weights:
            floating = {
                name: parameter
                for name, parameter in weight._parameters.items()
                if parameter is None or parameter.is_floating_point()
            }
            weight.__dict__["_parameters"] = floating
        yield
    finally:
        for weight, parameters in zip(weights, kept, strict=True):
            weight.__dict__["_parameters"] = parameters


def _weights(model: nn.Module) -> list[SparseWeight]:
    return [module for module in model.modules() if isinstance(module, SparseWeight)]


def _chooses(weight: SparseWeight) -> bool:
    """Whether the forward mask is always that of the stored dense weight."""
    return not weight.method.compressed and not weight.method.fades


@torch.no_grad()
def _follow(mine: SparseWeight, theirs: SparseWeight) -> None:
    """Give the average the forward mask of the model, to which a method may have moved values."""
    bits = theirs.forward_bits.detach()
    if (
        _chooses(mine)
        or not mine.method.steps
        or torch.equal(local(mine.forward_bits), local(bits))
    ):
        return
    if mine.method.compressed:
        move_values(mine, bits.to(mine.forward_bits.device))
    mine.forward_bits.copy_(bits)


def _install() -> None:
    original = AveragedModel.update_parameters

    @functools.wraps(original)
    def update_parameters(self: AveragedModel, model: nn.Module) -> Any:
        pairs = list(zip(_weights(self.module), _weights(model), strict=True))
        if not pairs:
            return original(self, model)
        for mine, theirs in pairs:
            _follow(mine, theirs)
        with masks_set_aside(self, model):
            result = original(self, model)
        for mine, theirs in pairs:
            if mine.factor is not None and theirs.factor is not None:
                mine.factor.copy_(theirs.factor)
            mine.phase.fading = theirs.phase.fading
            if _chooses(mine):
                mine.choose_forward_mask()
            mine.refresh_backward_mask()
        return result

    AveragedModel.update_parameters = update_parameters  # type: ignore[method-assign]


_install()
