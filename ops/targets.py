"""The ops that graphs are built from and searched for, as FX nodes have them for a target."""

import torch

# Importing their files is what registers them.
from slope_fx.ops import adapter as adapter
from slope_fx.ops import sparse_linear as sparse_linear
from slope_fx.ops import weights as weights

EXPAND = torch.ops.slope_fx.expand.default
ADD_ADAPTER = torch.ops.slope_fx.add_adapter.default
SPARSE_LINEAR = torch.ops.slope_fx.sparse_linear.default
