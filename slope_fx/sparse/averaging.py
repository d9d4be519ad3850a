"""Excludes masks from averages of weights.

Masks are parameters, so that FSDP shards them with the values. ``AveragedModel`` of torch averages
all parameters, and an average of packed bits is not a mask. This module patches
``AveragedModel.update_parameters``: masks are removed from the models during the update, and the
averaged model then chooses backward masks from its averaged values.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from slope_fx.sparse.weight import SparseWeight


@contextmanager
def masks_set_aside(*models: nn.Module) -> Iterator[None]:
    """Removes the masks of sparse weights from the parameters of the models in a ``with`` block."""
    weights = [m for model in models for m in model.modules() if isinstance(m, SparseWeight)]
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


def _install() -> None:
    original = AveragedModel.update_parameters

    @functools.wraps(original)
    def update_parameters(self: AveragedModel, model: nn.Module) -> Any:
        weights = [m for m in self.module.modules() if isinstance(m, SparseWeight)]
        if not weights:
            return original(self, model)
        with masks_set_aside(self, model):
            result = original(self, model)
        for weight in weights:
            weight.refresh_backward_mask()
        return result

    AveragedModel.update_parameters = update_parameters  # type: ignore[method-assign]


_install()
