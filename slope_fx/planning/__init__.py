"""Planning: the decisions that are made before a model is changed.

- ``config.py`` defines the configuration.
- ``trace.py`` finds the roles of the parameters in the model.
- ``plan.py`` decides which linears are pruned.
- ``masks.py`` chooses masks, and ``adapters.py`` makes initial adapters. ``calibration.py``
  observes the calibration inputs for both.
- ``regions.py`` chooses the modules that are compiled as separate graphs.
"""

from slope_fx.planning.config import SlopeConfig
from slope_fx.planning.masks import MASK_METHODS, mask_method
from slope_fx.planning.patterns import Pattern

__all__ = ["MASK_METHODS", "Pattern", "SlopeConfig", "mask_method"]
