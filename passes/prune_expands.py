"""The pass ``prune_expands``: merges equal markers and erases unused markers."""

from torch.fx import GraphModule, Node

from slope_fx.passes.context import Context
from slope_fx.passes.graph import arguments, erase_unused, value_of
from slope_fx.passes.markers import is_marked, markers


def prune_expands(gm: GraphModule, context: Context) -> int:
    """Merges equal markers of ``gm``, and erases markers without users.

    The pass changes only ``gm`` itself, not its nested graphs. Returns the number of erased
    markers.
    """
    before = len(markers(gm))
    known: dict[tuple[object, ...], Node] = {}
    for node in markers(gm):
        # The marker of an adapter comes after the marker of its weight, which is already merged.
        # One that was read under no_grad has no gradient.
        trains = getattr(value_of(node), "requires_grad", None)
        first = known.setdefault((node.target, trains, *arguments(node).values()), node)
        if first is not node:
            node.replace_all_uses_with(first)
    for node in reversed(list(gm.graph.nodes)):
        if not node._erased and not node.users and is_marked(node):
            erase_unused(node)
    return before - len(markers(gm))
