"""Looks at the input of every linear whose weight is a parameter; changes no number."""

from collections.abc import Callable

from torch import Tensor
from torch.fx import GraphModule, Node

from slope_fx.passes.decompose_attention import decompose_attention
from slope_fx.passes.graph import graphs_of
from slope_fx.passes.linears import LinearCall, find_linears
from slope_fx.passes.normalize_linears import normalize_linears
from slope_fx.passes.views import Read, View, read_of, source_of, view_of

Observer = Callable[[Tensor, Tensor, int, Tensor | None], None]
"""Called with the input, the parameter, the first of its rows that is read, and the offsets of a
grouped product."""


def observe_linears(gm: GraphModule, observer: Observer) -> int:
    """Call ``observer`` wherever a graph of a dense model computes a linear.

    Each linear is written in its plain form first, as for compressed weights, so that its input
    has its features last. Works on ``gm`` and the graphs nested in it. Returns the number of
    linears found.

    Args:
        gm: a Dynamo graph of a model whose weights are parameters.
        observer: gets the input, (..., d_in), of one matrix; (groups, rows, d_in) of a stack.
    """
    found = 0
    for graph_module in graphs_of(gm):
        graph = graph_module.graph
        decompose_attention(graph_module, opens=_is_parameter)
        normalize_linears(graph_module, reads=_parameter_read)
        for call in find_linears(graph_module):
            seen = _parameter_read(call) if call.build is None else None
            if seen is None:
                continue
            view, read = seen
            with graph.inserting_before(call.node):
                graph.call_function(observer, (call.x, view.source, read.start, call.offsets))
            found += 1
        graph.lint()
        graph_module.recompile()
    return found


def _is_parameter(operand: object) -> bool:
    """Whether it may be a parameter or a view of one: something that the graph is given."""
    return isinstance(operand, Node) and source_of(operand).op == "placeholder"


def _parameter_read(call: LinearCall) -> tuple[View, Read] | None:
    view = view_of(call.weight) if _is_parameter(call.weight) else None
    matrix = None if view is None else call.matrix(view.tensor)
    read = None if matrix is None else read_of(matrix)
    return None if view is None or read is None else (view, read)
