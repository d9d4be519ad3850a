"""Sparse linears that read the same input become one op: q, k and v; gate and up."""

import operator
from typing import Any

from torch.fx import GraphModule, Node

from slope_fx.ops.targets import SPARSE_LINEAR, SPARSE_PARALLEL_LINEAR
from slope_fx.passes.graph import replace, value_of
from slope_fx.passes.views import is_view

_NAMES = {"engine": "chosen", "input_engine": "input_chosen", "weight_engine": "weight_chosen"}


def merge_linears(gm: GraphModule) -> int:
    """``sparse_linear(x, W1), sparse_linear(x, W2)`` to ``sparse_parallel_linear(x, [W1, W2])``.

    No parameter is copied or moved: the op takes them apart. Works on ``gm`` alone, nested graphs
    aside. Returns the number of linears merged.
    """
    matches = 0
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    groups: dict[tuple[object, ...], list[Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=SPARSE_LINEAR):
        x, n, m = node.args[0], node.args[5], node.args[6]
        biased = node.args[4] is not None
        kind = (x, n, m, biased, tuple(sorted(node.kwargs)), node.kwargs.get("engines"))
        groups.setdefault((*kind, _dtype(node.args[1])), []).append(node)
    for nodes in groups.values():
        # All go to where the first is, so what they read must be there by then.
        first = min(nodes, key=order.__getitem__)
        ready = [n for n in nodes if all(_early(i, first, order) for i in n.all_input_nodes)]
        if len(ready) > 1:
            for node in ready:
                for operand in node.all_input_nodes:
                    _hoist(operand, first, order)
            _merge(gm, first, ready)
            matches += len(ready)
    return matches


def _early(operand: Node, first: Node, order: dict[Node, int]) -> bool:
    """Whether ``operand`` is there before ``first``, or is a view of what is, as rows are."""
    if order[operand] < order[first]:
        return True
    return is_view(operand) and _early(operand.all_input_nodes[0], first, order)


def _hoist(operand: Node, first: Node, order: dict[Node, int]) -> None:
    if order[operand] > order[first]:
        _hoist(operand.all_input_nodes[0], first, order)
        first.prepend(operand)
        order[operand] = order[first] - 1


def _merge(gm: GraphModule, first: Node, nodes: list[Node]) -> None:
    x, n, m = first.args[0], first.args[5], first.args[6]
    lists: list[Any] = [[node.args[i] for node in nodes] for i in range(1, 5)]
    lists[3] = [bias for bias in lists[3] if bias is not None]  # all of them have one, or none
    kwargs: dict[str, Any] = {
        _NAMES[name]: ",".join(str(node.kwargs[name]) for node in nodes)
        for name in first.kwargs
        if name in _NAMES
    }
    if "engines" in first.kwargs:
        kwargs["engines"] = first.kwargs["engines"]
    with gm.graph.inserting_before(first):
        merged = gm.graph.call_function(SPARSE_PARALLEL_LINEAR, (x, *lists, n, m), kwargs)
        merged.meta["example_value"] = [value_of(node) for node in nodes]
        parts = [gm.graph.call_function(operator.getitem, (merged, i)) for i in range(len(nodes))]
    for node, part in zip(nodes, parts, strict=True):
        replace(node, part)


def _dtype(values: object) -> object:
    return getattr(value_of(values), "dtype", None) if isinstance(values, Node) else None
