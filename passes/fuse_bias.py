"""A bias that is added to a sparse product is added by it."""

import operator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slope_fx.ops.targets import SPARSE_LINEAR
from slope_fx.passes.graph import replace, value_of

_ADDS = (torch.add, operator.add, operator.iadd)


def fuse_bias(gm: GraphModule) -> int:
    """``sparse_linear(x, W, None) + b`` to ``sparse_linear(x, W, b)``, for b a vector.

    Works on ``gm`` alone, nested graphs aside. Returns the number of biases taken in.
    """
    matches = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in _ADDS or node.kwargs:
            continue
        for product, bias in (node.args, reversed(node.args)):
            if _fits(node, product, bias):
                with gm.graph.inserting_before(node):
                    args = (*product.args[:4], bias, *product.args[5:])
                    fused = gm.graph.call_function(SPARSE_LINEAR, args, product.kwargs)
                fused.meta.update(product.meta)
                replace(node, fused)
                matches += 1
                break
    return matches


def _fits(node: Node, product: object, bias: object) -> bool:
    if not isinstance(product, Node) or not isinstance(bias, Node):
        return False
    if product.target is not SPARSE_LINEAR or product.args[4] is not None or len(product.users) > 1:
        return False
    one, two = value_of(product), value_of(bias)
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return False
    return two.dim() == 1 and two.shape[0] == one.shape[-1] and one.dtype == two.dtype
