"""The central rewrite: a linear over an expanded weight becomes the sparse linear."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slope_fx.kernels.engines import without_operands
from slope_fx.kernels.selection import choose
from slope_fx.ops.dispatch import request_of
from slope_fx.ops.targets import EXPAND, SPARSE_GROUPED_LINEAR, SPARSE_LINEAR
from slope_fx.passes.context import Context
from slope_fx.passes.graph import emit, rank_of, replace, value_of
from slope_fx.passes.linears import LinearCall, find_linears
from slope_fx.passes.markers import marked_read, rows
from slope_fx.passes.views import Read


def sparsify_linears(gm: GraphModule, context: Context) -> int:
    """``linear(x, expand(values, masks), b)`` to ``sparse_linear(x, values, masks, b)``.

    Also of some rows of the weight, of a cast of it, and of a stack of weights. The engine that
    computes it is chosen here and named in the graph. Works on ``gm`` alone, nested graphs
    aside. Returns the number of linears rewritten.
    """
    matches = 0
    for call in find_linears(gm):
        found = marked_read(call)
        if call.build is not None or found is None:
            continue
        view, read = found
        if view.source.target is not EXPAND or not _whole_groups(view.source, read):
            continue
        build = _sparse(call, view.source, read, view.dtype, context)
        operands = (call.x, *view.source.args[:3], call.bias, call.offsets)
        replace(call.node, emit(call.node, build, *operands))
        matches += 1
    return matches


def _whole_groups(marker: Node, read: Read) -> bool:
    """Whether the rows read are whole groups of the backward mask's."""
    m: Any = marker.args[4]
    return not (read.start % m or (read.stop - read.start) // read.groups % m)


def _sparse(
    call: LinearCall, marker: Node, read: Read, dtype: torch.dtype | None, context: Context
) -> Any:
    n, m = marker.args[3:]
    whole = value_of(marker)
    assert isinstance(whole, Tensor)
    total = whole.shape[0]
    stacked = rank_of(call.weight) == 3
    fused = call.bias is None or (
        rank_of(call.bias) == 1 and not stacked and _length(call.bias) != 1
    )
    engines = context.engines
    if stacked or (read.start, read.stop) != (0, total):
        # What is made of a slice of the values can't be kept: it is another tensor at each use.
        engines = without_operands(engines)
    chosen = _choices(call, marker, read, dtype, engines, context)
    chosen["engines"] = engines

    def build(x: Any, values: Any, forward: Any, backward: Any, bias: Any, offsets: Any) -> Any:
        values, forward, backward = (
            rows(t, read.start, read.stop, total) for t in (values, forward, backward)
        )
        values = values if dtype is None else values.to(dtype)
        if stacked:
            return SPARSE_GROUPED_LINEAR(
                x, values, forward, backward, offsets, read.groups, n, m, **chosen
            )
        y = SPARSE_LINEAR(x, values, forward, backward, bias if fused else None, n, m, **chosen)
        return y if fused else torch.add(y, bias)

    return build


def _choices(
    call: LinearCall, marker: Node, read: Read, dtype: torch.dtype | None, engines: str,
    context: Context,
) -> dict[str, str]:  # fmt: skip
    """The engines of a product and of its gradients, as arguments of the op.

    They are chosen here rather than when the op is traced, because torch.compile may take
    the traced graph from its cache, whose key is this graph. Left out is what the graph
    doesn't tell: with autocast inside of it the op chooses when it has cast.
    """
    values: Any = marker.args[0]
    n: Any = marker.args[3]
    m: Any = marker.args[4]
    x, weight = value_of(call.x), value_of(values)
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        return {}
    if call.x.graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast):
        return {}
    groups = read.groups
    size = ((read.stop - read.start) // groups, weight.shape[1])
    trains = context.training and weight.requires_grad
    request = request_of(
        x,
        size,
        n,
        m,
        groups,
        dtype=context.dtype_of(x.device, x.dtype),
        values_dtype=dtype or weight.dtype,
        trains=trains or context.replays,
        engines=engines,
    )
    chosen = {"engine": choose("sparse_linear", request)}
    if trains:
        chosen["weight_engine"] = choose("sparse_weight_grad", request)
    if context.training and x.requires_grad:
        chosen["input_engine"] = choose("sparse_input_grad", request)
    return chosen


def _length(vector: Node) -> int | None:
    value = value_of(vector)
    return int(value.shape[0]) if isinstance(value, Tensor) else None
