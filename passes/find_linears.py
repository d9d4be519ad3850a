"""Find every linear of a graph."""

from torch.fx import GraphModule

from slope_fx.passes.graph import LinearCall, match_linear


def find_linears(gm: GraphModule) -> list[LinearCall]:
    """The linears of ``gm`` itself, nested graphs aside, in the order they run.

    Reads both Dynamo's graphs and exported ones; changes nothing. A linear is
    ``linear``, ``addmm``, ``mm``, ``matmul`` or ``@`` whose right operand is a matrix;
    what that operand is (a parameter, a marker, an activation) is the caller's to ask.
    """
    return [call for node in gm.graph.nodes if (call := match_linear(node)) is not None]
