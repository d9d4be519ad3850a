"""Where no gradients are needed, a product and its low-rank branch are one op."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from slope_fx.ops.targets import SPARSE_ADAPTED_LINEAR, SPARSE_LINEAR
from slope_fx.passes.context import Context
from slope_fx.passes.graph import replace


def fuse_adapters(gm: GraphModule, context: Context) -> int:
    """``sparse_linear(x, W, b) + s (x A^T) B^T`` to ``sparse_adapted_linear(x, W, b, A, B, s)``.

    Only in graphs without gradients, for the op has none. Works on ``gm`` alone, nested graphs
    aside. Returns the number of branches taken in.
    """
    if context.training:
        return 0
    matches = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=torch.add)):
        found = _branch(node)
        if found is None:
            continue
        product, lora_a, lora_b = found
        x, values, mask, _, bias, n, m = product.args
        scale: Any = node.kwargs["alpha"]
        engines = {k: v for k, v in product.kwargs.items() if k in ("engine", "engines")}
        with gm.graph.inserting_before(node):
            args = (x, values, mask, bias, lora_a, lora_b, scale, n, m)
            fused = gm.graph.call_function(SPARSE_ADAPTED_LINEAR, args, engines)
        replace(node, fused)
        matches += 1
    return matches


def _branch(node: Node) -> tuple[Node, Node, Node] | None:
    """The product, A and B of a sum that ``insert_adapters`` made; None of another."""
    if len(node.args) != 2 or set(node.kwargs) != {"alpha"}:
        return None
    product, up = node.args
    if not isinstance(product, Node) or not isinstance(up, Node):
        return None
    down = up.args[0] if up.target is F.linear and len(up.args) == 2 else None
    if product.target is not SPARSE_LINEAR or not isinstance(down, Node):
        return None
    if down.target is not F.linear or len(down.args) != 2 or down.args[0] is not product.args[0]:
        return None
    if any(len(part.users) > 1 for part in (product, up, down)):
        return None
    lora_a, lora_b = down.args[1], up.args[1]
    if not isinstance(lora_a, Node) or not isinstance(lora_b, Node):
        return None
    return product, lora_a, lora_b
