"""Find every linear of a graph."""

from collections.abc import Iterator

from torch.fx import GraphModule

from slope_fx.passes.graph import LinearCall, match_linear


def find_linears(gm: GraphModule) -> Iterator[LinearCall]:
    """The linears of ``gm`` itself, nested graphs aside, in the order they run.

    Reads both Dynamo's graphs and exported ones; changes nothing. A linear is
    ``linear``, ``addmm``, ``mm``, ``matmul`` or ``@`` whose right operand is a matrix;
    what that operand is (a parameter, a marker, an activation) is the caller's to ask.

    Each is matched when it is reached, so a pass may replace one before it takes the
    next, which may read it.
    """
    for node in list(gm.graph.nodes):
        call = match_linear(node)
        if call is not None:
            yield call
