"""From an op to the engine that computes it."""

from types import ModuleType

import torch

from slope_fx.kernels import ENGINES, engine_for


def engine(tensor: torch.Tensor) -> ModuleType:
    """The engine for the device of ``tensor``."""
    return ENGINES[engine_for(tensor.device)]
