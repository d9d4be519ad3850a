"""The overloads of the ops that are targets of FX nodes."""

import torch

# The imports register the ops.
from slope_fx.ops import adapter as adapter
from slope_fx.ops import frozen as frozen
from slope_fx.ops import sparse_linear as sparse_linear
from slope_fx.ops import weights as weights

EXPAND = torch.ops.slope_fx.expand.default
ADD_ADAPTER = torch.ops.slope_fx.add_adapter.default
SPARSE_LINEAR = torch.ops.slope_fx.sparse_linear.default
FROZEN_EXPAND = frozen.FROZEN_EXPAND
FROZEN_LINEAR = frozen.FROZEN_LINEAR
FROZEN_LINEARS = frozen.FROZEN_LINEARS
FROZEN_GROUPED_LINEAR = frozen.FROZEN_GROUPED_LINEAR
FROZEN_LINEAR_WITH_GRAD = frozen.FROZEN_LINEAR_WITH_GRAD
