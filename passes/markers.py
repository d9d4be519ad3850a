"""Markers, the nodes that a read of a compressed weight leaves in a graph."""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from slope_fx.ops.targets import ADD_ADAPTER, EXPAND, FROZEN_EXPAND
from slope_fx.passes.graph import value_of
from slope_fx.passes.linears import LinearCall
from slope_fx.passes.views import Read, View, read_of, source_of, view_of

MARKERS = (EXPAND, ADD_ADAPTER, FROZEN_EXPAND)
_SET_GRAD_ENABLED = torch._C._set_grad_enabled


def is_marked(operand: object) -> bool:
    """Whether ``operand`` is a marker, or a view of a marker."""
    return isinstance(operand, Node) and source_of(operand).target in MARKERS


def markers(gm: GraphModule) -> list[Node]:
    """The markers of ``gm``, in execution order."""
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target in MARKERS]


def marked_read(call: LinearCall) -> tuple[View, Read] | None:
    """The view and the rows of a marker that ``call`` reads.

    None if the weight of ``call`` is not a marker, is not made of complete rows of one, or was read
    under ``no_grad`` for a linear with gradients: the product would give the values a gradient.
    """
    if not is_marked(call.weight):
        return None
    view = None if _lost_grad(call) else view_of(call.weight)
    matrix = None if view is None else call.matrix(view.tensor)
    read = None if matrix is None else read_of(matrix)
    if view is None or read is None or read.transposed:
        return None
    # The columns of the marker must be the inputs of the linear.
    whole = view_of(view.source)
    return (view, read) if whole and whole.tensor.shape[1] == read.d_in else None


def _lost_grad(call: LinearCall) -> bool:
    """Whether the weight was read without gradients, by a linear after the ``no_grad`` region."""
    modes = [
        node for node in call.node.graph.find_nodes(op="call_function", target=_SET_GRAD_ENABLED)
        if node < call.node
    ]  # fmt: skip
    if not modes or not modes[-1].args[0]:
        return False
    marker = source_of(call.weight)
    trains = any(getattr(value_of(n), "requires_grad", False) for n in marker.all_input_nodes)
    return trains and not getattr(value_of(call.weight), "requires_grad", False)


def rows(tensor: Any, start: int, stop: int, total: int) -> Any:
    """The rows ``start:stop`` of a tensor with ``total`` rows."""
    return tensor if (start, stop) == (0, total) else tensor[start:stop]
