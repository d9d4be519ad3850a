"""The pass ``sparsify_linears``: rewrites linears with expanded weights to sparse linears."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slope_fx.kernels.engines import without_operands
from slope_fx.kernels.selection import Request, choose
from slope_fx.ops.dispatch import request_of
from slope_fx.ops.targets import EXPAND, SPARSE_LINEAR
from slope_fx.passes.context import Context
from slope_fx.passes.graph import arguments, emit, is_row, rank_of, replace, value_of
from slope_fx.passes.linears import LinearCall, find_linears
from slope_fx.passes.markers import marked_read, rows
from slope_fx.passes.views import Read, View


def sparsify_linears(gm: GraphModule, context: Context) -> int:
    """Rewrites ``linear(x, expand(values, masks), b)`` to ``sparse_linear(x, values, masks, b)``.

    The linear may read some rows of the weight, a cast of it, or a stack of weights. The pass
    chooses the engines and names them in the graph, because torch.compile may load the compiled
    graph from its cache, with this graph as the key. The pass changes only ``gm`` itself, not its
    nested graphs. Returns the number of rewritten linears.
    """
    matches = 0
    for call in find_linears(gm):
        found = marked_read(call)
        if call.build is not None or found is None:
            continue
        view, read = found
        if view.source.target is not EXPAND or not _whole_groups(view.source, read):
            continue
        marker = arguments(view.source)
        if marker["master"] is not None and rank_of(call.weight) == 3:
            continue  # a stack with a dense gradient: PyTorch's own product
        masks = marker["forward_mask"], marker["backward_mask"]
        operands = (call.x, marker["values"], *masks, call.bias, call.offsets, marker["master"])
        replace(call.node, emit(call.node, _sparse(call, view, read, context), *operands))
        matches += 1
    if matches:
        _name_engines(gm, context)
    return matches


def _whole_groups(marker: Node, read: Read) -> bool:
    """Whether the rows are complete groups of the backward mask."""
    m: int = arguments(marker)["m"]
    return not (read.start % m or (read.stop - read.start) // read.groups % m)


def _sparse(call: LinearCall, view: View, read: Read, context: Context) -> Any:
    marker, whole = arguments(view.source), value_of(view.source)
    assert isinstance(whole, Tensor)
    total, pattern = whole.shape[0], (marker["n"], marker["m"])
    stacked = rank_of(call.weight) == 3
    fused = call.bias is None or (
        not stacked and _is_fused(call.x, call.bias, context.at(call.node))
    )
    engines, computed = context.engines, marker["values"].op in ("call_function", "call_method")
    if computed or stacked or (read.start, read.stop) != (0, total):
        # An operand that is made from a slice, or from values that are computed, cannot be kept,
        # because each use makes a new tensor.
        engines = without_operands(engines)

    def build(
        x: Any, values: Any, forward: Any, backward: Any, bias: Any, offsets: Any, master: Any
    ) -> Any:
        values, forward, backward = (
            rows(t, read.start, read.stop, total) for t in (values, forward, backward)
        )
        more = {}
        if master is not None:
            more["master"] = rows(master, read.start, read.stop, total)
        values = view.cast(values)
        masks, added = (forward, backward), bias if fused else None
        groups = (read.groups, offsets) if stacked else ()
        y = SPARSE_LINEAR(x, values, *masks, added, *pattern, *groups, engines=engines, **more)
        return y if fused else torch.add(y, bias)

    return build


def _is_fused(x: Node, bias: Node, here: Context) -> bool:
    """Whether the op can add a bias: a row in the dtype of the product."""
    one, other = value_of(x), value_of(bias)
    if not (isinstance(one, Tensor) and isinstance(other, Tensor) and is_row(bias)):
        return False
    device = one.device
    return here.dtype_of(device, one.dtype) == here.dtype_of(device, other.dtype)


def _name_engines(gm: GraphModule, context: Context) -> None:
    """Choose and name the engines of sparse linears without engines."""
    for node in gm.graph.find_nodes(op="call_function", target=SPARSE_LINEAR):
        if not arguments(node)["engine"]:
            node.kwargs = {**node.kwargs, **_engines_of(node, context)}


def request_for(node: Node, context: Context) -> Request | None:
    """Returns the request for the engines of a sparse linear; None without fake values.

    Args:
        node: the sparse linear.
        context: the context of its graph.
    """
    call = arguments(node)
    x, values = (value_of(call[name]) for name in ("x", "values"))
    if not (isinstance(x, Tensor) and isinstance(values, Tensor) and context.certain):
        return None
    here = context.at(node)
    # With a dense master weight, its values are new in each step.
    learns = values.requires_grad or call["master"] is not None
    trains = (here.training and learns) or here.replays
    return request_of(
        x, values, call["n"], call["m"], call["groups"], trains=trains, engines=call["engines"],
        dtype=here.dtype_of(x.device, x.dtype),
    )  # fmt: skip


def _engines_of(node: Node, context: Context) -> dict[str, str]:
    """The engines of a sparse linear and of its gradients, by the op's argument."""
    request = request_for(node, context)
    if request is None:
        return {}
    call = arguments(node)
    x, values = (value_of(call[name]) for name in ("x", "values"))
    wanted = {
        "engine": ("sparse_linear", True),
        "weight_engine": ("sparse_weight_grad", getattr(values, "requires_grad", False)),
        "input_engine": ("sparse_input_grad", getattr(x, "requires_grad", False)),
    }
    sparse = context.training and call["master"] is None  # whether the gradients are sparse
    return {
        name: choose(op, request)
        for name, (op, needed) in wanted.items()
        if needed and (sparse or op == "sparse_linear")
    }
