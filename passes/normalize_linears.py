"""The pass ``normalize_linears``: rewrites linears to their plain form."""

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
    """Rewrites ``x @ W.T``, ``addmm``, ``einsum``, convolutions of one pixel etc. to ``F.linear``.

    Products with a stack of weights become ``torch.bmm``. Grouped products do not change. The pass
    changes only ``gm`` itself, not its nested graphs.

    Args:
        gm: a Dynamo graph.
        context: not used.
        reads: returns the view and the rows that a linear reads of its weight, or None for a
            linear that is not rewritten.

    Returns:
        The number of rewritten linears.
    """
    matches = 0
    for call in find_linears(gm):
        if call.build is None or reads(call) is None:
            continue
        replace(call.node, emit(call.node, call.build, call.x, call.weight, call.bias))
        matches += 1
    return matches
