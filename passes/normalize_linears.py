"""All ways of writing a linear over a compressed weight become one of three."""

from collections.abc import Callable

from torch.fx import GraphModule

from slope_fx.passes.context import Context
from slope_fx.passes.graph import emit, replace
from slope_fx.passes.linears import LinearCall, find_linears
from slope_fx.passes.markers import marked_read
from slope_fx.passes.views import Read, View


def normalize_linears(
    gm: GraphModule,
    context: Context,
    reads: Callable[[LinearCall], tuple[View, Read] | None] = marked_read,
) -> int:
    """``x @ W.T``, ``addmm``, ``einsum``, a convolution of one pixel and so on to ``F.linear``.

    Products of a stack of weights become ``torch.bmm``; grouped ones stay as they are. Works on
    ``gm`` alone, nested graphs aside. Returns the number of linears rewritten.

    Args:
        gm: a Dynamo graph.
        context: not used.
        reads: tells what a linear reads of its weight, and is None for those to leave alone.
    """
    matches = 0
    for call in find_linears(gm):
        if call.build is None or reads(call) is None:
            continue
        replace(call.node, emit(call.node, call.build, call.x, call.weight, call.bias))
        matches += 1
    return matches
