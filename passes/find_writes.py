"""Finds writes to compressed weights in a graph.

A marker's result is a temporary tensor, so a write to it would be lost.
"""

import functools
import inspect
import operator
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from slope_fx.passes.graph import arguments, aten
from slope_fx.passes.markers import MARKERS
from slope_fx.passes.views import is_view

_ALIASES: set[object] = {
    "detach", "expand", "view_as", "expand_as", "diagonal", "data", torch.detach, torch.diagonal,
    aten.detach.default, getattr(torch._C._autograd, "_get_data_attr", None),
}  # fmt: skip
_IN_PLACE: set[object] = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior,
    operator.ixor, operator.ilshift, operator.irshift,
}  # fmt: skip
_DUNDERS = {f"__{op.__name__}__" for op in _IN_PLACE}  # type: ignore[attr-defined]


def find_writes(gm: GraphModule) -> list[tuple[Node, str]]:
    """The markers of ``gm`` with writes to their results or views, and the writing op's name.

    The search covers only ``gm`` itself, not its nested graphs.
    """
    found = []
    for node in gm.graph.nodes:
        for target in written_by(node):
            source = memory_of(target)
            if source.target in MARKERS:
                found.append((source, str(getattr(node.target, "__name__", node.target))))
    return found


def written_by(node: Node) -> list[Node]:
    """The operands that ``node`` writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    written = [node.kwargs.get("out")]
    name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or node.target in _IN_PLACE or name in _DUNDERS or _inplace_flag(node) is True:
        written.append(node.args[0] if node.args else None)
    if isinstance(node.target, OpOverload):  # a custom op may have any name
        schema, given = node.target._schema.arguments, arguments(node)
        written += [given.get(a.name) for a in schema if a.is_write]
    flat = [t for w in written for t in (w if isinstance(w, (list, tuple)) else [w])]
    return [target for target in flat if isinstance(target, Node)]


def _inplace_flag(node: Node) -> object:
    """The argument ``inplace`` of a function such as ``F.leaky_relu``, also by position."""
    position = _place_of_inplace(node.target) if node.op == "call_function" else None
    if position is not None and position < len(node.args):
        return node.args[position]
    return node.kwargs.get("inplace")


@functools.cache
def _place_of_inplace(function: Any) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin, which has no such argument
        return None
    return names.index("inplace") if "inplace" in names else None


def memory_of(node: Node) -> Node:
    """The first node whose memory ``node`` shares, through views, aliases and in-place ops."""
    seen = node
    while True:
        if is_view(node) or node.target in _ALIASES:
            node = node.all_input_nodes[0]
        elif written := written_by(node):
            node = written[0]  # an in-place op returns the tensor that it wrote to
        else:
            return node
        if node is seen:
            return node
