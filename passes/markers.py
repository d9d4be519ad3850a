"""The markers that a compressed weight reads as, and how a pass takes a part of one."""

from typing import Any

from torch.fx import GraphModule, Node

from slope_fx.ops.targets import ADD_ADAPTER, EXPAND
from slope_fx.passes.linears import LinearCall
from slope_fx.passes.views import Read, View, read_of, source_of, view_of

MARKERS = (EXPAND, ADD_ADAPTER)


def is_marked(operand: object) -> bool:
    """Whether ``operand`` is a node that reads a compressed weight, or a view of one."""
    return isinstance(operand, Node) and source_of(operand).target in MARKERS


def markers(gm: GraphModule) -> list[Node]:
    """The nodes of ``gm`` that rebuild a dense weight, in the order they run."""
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target in MARKERS]


def marked_read(call: LinearCall) -> tuple[View, Read] | None:
    """What ``call`` reads of a marker; None if its weight is another, or isn't whole rows."""
    if not is_marked(call.weight):
        return None
    view = view_of(call.weight)
    matrix = None if view is None else call.matrix(view.tensor)
    read = None if matrix is None else read_of(matrix)
    if view is None or read is None or read.transposed:
        return None
    # The rows of a marker are those of the linear: what reads it in other rows is another one.
    whole = view_of(view.source)
    return (view, read) if whole and whole.tensor.shape[1] == read.d_in else None


def rows(tensor: Any, start: int, stop: int, total: int) -> Any:
    """The rows from ``start`` to ``stop`` of a tensor that has ``total``."""
    return tensor if (start, stop) == (0, total) else tensor[start:stop]
