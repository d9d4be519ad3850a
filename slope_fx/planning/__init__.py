"""Decisions, taken before a model is changed: which weights are pruned, and how.

``config.py`` is what the user asks for. ``trace.py`` learns what the model does with its
parameters, ``plan.py`` decides what becomes of each linear, ``masks.py`` and ``adapters.py`` choose
masks and initial adapters, from the inputs that ``calibration.py`` observes if they need them.
``regions.py`` decides which modules are compiled as graphs of their own.
"""

from slope_fx.planning.config import SlopeConfig
from slope_fx.planning.masks import MASK_METHODS, mask_method
from slope_fx.planning.patterns import Pattern

__all__ = ["MASK_METHODS", "Pattern", "SlopeConfig", "mask_method"]
