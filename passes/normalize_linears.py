"""All ways of writing a linear over a compressed weight become one of three."""

from torch.fx import GraphModule

from slope_fx.passes.graph import emit, replace
from slope_fx.passes.linears import find_linears
from slope_fx.passes.markers import marked_read


def normalize_linears(gm: GraphModule) -> int:
    """``x @ W.T``, ``addmm``, ``einsum``, a convolution of one pixel and so on to ``F.linear``.

    Products of a stack of weights become ``torch.bmm``; grouped ones stay as they are. Works on
    ``gm`` alone, nested graphs aside. Returns the number of linears rewritten.
    """
    matches = 0
    for call in find_linears(gm):
        if call.build is None or marked_read(call) is None:
            continue
        replace(call.node, emit(call.node, call.build, call.x, call.weight, call.bias))
        matches += 1
    return matches
