"""The central rewrite: a linear over an expanded weight becomes the sparse linear."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slope_fx.ops.targets import EXPAND, SPARSE_LINEAR
from slope_fx.passes.find_linears import find_linears
from slope_fx.passes.graph import replace, value_of


def sparsify_linears(gm: GraphModule) -> int:
    """``linear(x, expand(values, masks), b)`` to ``sparse_linear(x, values, masks, b)``.

    Works on ``gm`` alone, nested graphs aside. Returns the number of linears rewritten.
    """
    matches = 0
    for call in find_linears(gm):
        marker = call.weight
        # x @ W (without a transpose) reads the weight the other way round: its groups
        # run along d_out there, so it isn't the linear that the marker stands for.
        if marker.target is not EXPAND or call.stored_transposed:
            continue
        values, forward_mask, backward_mask, n, m = marker.args
        fused, separate = (call.bias, None) if _is_vector(call.bias) else (None, call.bias)
        with gm.graph.inserting_before(call.node):
            result = gm.graph.call_function(
                SPARSE_LINEAR, (call.x, values, forward_mask, backward_mask, fused, n, m)
            )
            if separate is not None:
                result = gm.graph.call_function(torch.add, (result, separate))
        replace(gm, call.node, result)
        matches += 1
    return matches


def _is_vector(bias: Node | None) -> bool:
    """Whether ``bias`` is (d_out,), as the op takes it, or broadcasts some other way."""
    value = None if bias is None else value_of(bias)
    return bias is None or (isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] != 1)
