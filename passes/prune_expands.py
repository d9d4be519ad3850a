"""A weight that is read several times is one marker; one that nothing reads is none."""

from torch.fx import GraphModule, Node

from slope_fx.passes.context import Context
from slope_fx.passes.graph import erase_unused
from slope_fx.passes.markers import is_marked, markers


def prune_expands(gm: GraphModule, context: Context) -> int:
    """Merge the markers of ``gm`` that compute the same, and drop those that nothing reads.

    Works on ``gm`` alone, nested graphs aside. Returns the number of markers taken away.
    """
    before = len(markers(gm))
    known: dict[tuple[object, ...], Node] = {}
    for node in markers(gm):
        # An adapter's marker comes after that of its weight, which is merged by then.
        first = known.setdefault((node.target, node.args), node)
        if first is not node:
            node.replace_all_uses_with(first)
    for node in reversed(list(gm.graph.nodes)):
        if not node._erased and not node.users and is_marked(node):
            erase_unused(node)
    return before - len(markers(gm))
