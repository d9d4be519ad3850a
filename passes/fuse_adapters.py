"""Where no gradients are needed, a product and its low-rank branch are one op."""

import operator
from typing import Any, TypeGuard

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
    for node in list(gm.graph.find_nodes(op="call_function", target=operator.add)):
        found = _branch(node)
        if found is None:
            continue
        product, lora_a, lora_b, scale = found
        x, values, mask, _, bias, n, m = product.args
        engines = {k: v for k, v in product.kwargs.items() if k in ("engine", "engines")}
        with gm.graph.inserting_before(node):
            args = (x, values, mask, bias, lora_a, lora_b, scale, n, m)
            fused = gm.graph.call_function(SPARSE_ADAPTED_LINEAR, args, engines)
        replace(node, fused)
        matches += 1
    return matches


def _branch(node: Node) -> tuple[Node, Node, Node, Any] | None:
    """The product, A, B and scale of a sum that ``insert_adapters`` made; None of another."""
    if len(node.args) != 2 or node.kwargs:
        return None
    product, up = node.args
    if not _calls(product, SPARSE_LINEAR) or not _calls(up, F.linear) or len(up.args) != 2:
        return None
    scaled, lora_b = up.args
    if not _calls(scaled, operator.mul) or not isinstance(lora_b, Node):
        return None
    down, scale = scaled.args
    if not _calls(down, F.linear) or len(down.args) != 2 or down.args[0] is not product.args[0]:
        return None
    lora_a = down.args[1]
    if any(len(part.users) > 1 for part in (product, up, scaled, down)):
        return None
    return (product, lora_a, lora_b, scale) if isinstance(lora_a, Node) else None


def _calls(node: object, target: object) -> TypeGuard[Node]:
    return isinstance(node, Node) and node.target is target
