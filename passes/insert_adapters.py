"""The adapter phase: a low-rank branch beside the product, instead of a dense ``B A``."""

import torch
from torch.fx import GraphModule, Node

from slope_fx.ops.targets import ADD_ADAPTER
from slope_fx.passes.find_linears import find_linears
from slope_fx.passes.graph import replace


def insert_adapters(gm: GraphModule) -> int:
    """``linear(x, add_adapter(W, A, B, s), b)`` to ``linear(x, W, b) + s (x A^T) B^T``.

    Works on ``gm`` alone, nested graphs aside. The linear over ``W`` is left for
    ``sparsify_linears``, which runs after. Returns the number of branches inserted.
    """
    matches = 0
    for call in find_linears(gm):
        marker = call.weight
        # Read as (d_out, d_in): a marker that an odd number of transposes turns is
        # the same linear if the product turns it back.
        if marker.target is not ADD_ADAPTER or call.stored_transposed:
            continue
        weight, lora_a, lora_b, scale = marker.args
        assert isinstance(weight, Node)
        with gm.graph.inserting_before(call.node):
            linear = torch.nn.functional.linear
            product = gm.graph.call_function(linear, (call.x, weight))
            down = gm.graph.call_function(linear, (call.x, lora_a))
            up = gm.graph.call_function(linear, (down, lora_b))
            if call.bias is not None:
                product.args = (call.x, weight, call.bias)
            result = gm.graph.call_function(torch.add, (product, up), {"alpha": scale})
        replace(gm, call.node, result)
        matches += 1
    return matches
