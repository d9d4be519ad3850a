"""Inserts observers of the inputs of linears. The results of the graph do not change."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slope_fx.passes.context import Context
from slope_fx.passes.decompose_attention import decompose_attention
from slope_fx.passes.graph import graphs_of, rank_of, value_of
from slope_fx.passes.linears import LinearCall, find_linears
from slope_fx.passes.normalize_linears import normalize_linears
from slope_fx.passes.views import Read, View, read_of, source_of, view_of

Rows = tuple[int, int, int]
"""The rows that a linear reads of a weight: start, stop, and the number of matrices."""
Observer = Callable[[Tensor, Tensor, Rows, Tensor | None], None]
"""A function of the input, the parameter, the rows, and the offsets of a grouped product."""


def observe_linears(gm: GraphModule, observer: Observer) -> int:
    """Insert a call of ``observer`` before each linear in a graph of a dense model.

    Each linear is first rewritten to its plain form, so that the features are the last dimension
    of its input. The pass changes ``gm`` and its nested graphs.

    Args:
        gm: a Dynamo graph of a model whose weights are parameters.
        observer: called with the input: (..., d_in) for one matrix, (groups, rows, d_in) for a
            stack, or (rows, d_in) for a stack with the same input for all matrices.

    Returns:
        The number of observed linears.
    """
    found, context = 0, Context.here()
    for graph_module in graphs_of(gm):
        graph = graph_module.graph
        decompose_attention(graph_module, context, opens=_is_parameter)
        normalize_linears(graph_module, context, reads=_read_to_normalize)
        for call in find_linears(graph_module):
            seen = _parameter_read(call)
            if seen is None or (call.build is not None and not _is_broadcast(call, seen[1])):
                continue
            view, read = seen
            with graph.inserting_before(call.node):
                rows = (read.start, read.stop, read.groups)
                graph.call_function(observer, (call.x, view.source, rows, call.offsets))
            found += 1
        graph.lint()
        graph_module.recompile()
    return found


def _is_parameter(operand: object) -> bool:
    """Whether ``operand`` is a parameter among the graph's inputs, or a view of one."""
    if not isinstance(operand, Node):
        return False
    source = source_of(operand)
    return source.op == "placeholder" and isinstance(value_of(source), torch.nn.Parameter)


def _read_to_normalize(call: LinearCall) -> tuple[View, Read] | None:
    seen = _parameter_read(call)
    return None if seen is None or _is_broadcast(call, seen[1]) else seen


def _is_broadcast(call: LinearCall, read: Read) -> bool:
    """Whether all matrices of a stack have the same input (rows, d_in).

    Such a linear is not rewritten: for transposed matrices, its plain form copies the weight.
    """
    return read.groups > 1 and rank_of(call.x) == 2 and call.offsets is None


def _parameter_read(call: LinearCall) -> tuple[View, Read] | None:
    view = view_of(call.weight) if _is_parameter(call.weight) else None
    matrix = None if view is None else call.matrix(view.tensor)
    read = None if matrix is None else read_of(matrix)
    return None if view is None or read is None else (view, read)
