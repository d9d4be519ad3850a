"""The pass ``join_linears``: frozen linears with the same input become one call."""

import operator
from typing import Any

from torch.fx import GraphModule, Node

from slope_fx.ops.targets import FROZEN_LINEAR, FROZEN_LINEARS
from slope_fx.passes.context import Context
from slope_fx.passes.find_writes import memory_of, written_by
from slope_fx.passes.graph import arguments

_OPTIONAL = ("scales", "bias", "lora_A", "lora_B")
_HEAD = 6
"""The numbers of a form before its routes (``ops/frozen.py``)."""


def join_linears(gm: GraphModule, context: Context) -> int:
    """Rewrites several ``frozen_linear(x, ...)`` to one ``frozen_linears(x, [...])``.

    Such are the projections of queries, keys and values, and the gate and up projections of an
    MLP. For few tokens, one call reads their inputs and starts the threads once. Linears are joined
    if they have one N:M pattern and format, and each operand (bias, adapter) is there for all or
    for none. Returns the number of joined linears.
    """
    written = {memory_of(target) for node in gm.graph.nodes for target in written_by(node)}
    groups: dict[tuple[object, ...], list[Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=FROZEN_LINEAR):
        call = arguments(node)
        # A later linear may read another input after a write.
        if memory_of(call["x"]) not in written:
            has = tuple(call[name] is not None for name in _OPTIONAL)
            groups.setdefault((call["x"], tuple(call["form"])[:_HEAD], has), []).append(node)
    matches = 0
    for first, *others in groups.values():
        later = [n for n in others if all(i < first for i in n.all_input_nodes)]
        if later:
            _join([first, *later])
            matches += 1 + len(later)
    return matches


def _join(nodes: list[Node]) -> None:
    calls = [arguments(node) for node in nodes]
    names = ("values", "forward_mask", *_OPTIONAL)
    # None, because AOTInductor's programs don't pass an empty list of tensors.
    lists = [[call[name] for call in calls if call[name] is not None] or None for name in names]
    operands = (calls[0]["x"], *lists, _padded([list(call["form"]) for call in calls]))
    with nodes[0].graph.inserting_before(nodes[0]):
        joined = nodes[0].graph.call_function(FROZEN_LINEARS, operands)
    for key in ("val", "example_value"):
        if all(key in node.meta for node in nodes):
            joined.meta[key] = [node.meta[key] for node in nodes]
    for k, node in enumerate(nodes):  # nodes of an exported program must keep their names
        node.target, node.args, node.kwargs = operator.getitem, (joined, k), {}


def _padded(forms: list[list[int]]) -> list[Any]:
    """The forms as one flat list. Shorter forms repeat their last pair, which changes nothing."""
    most = max(map(len, forms))
    return [number for form in forms for number in form + form[-2:] * ((most - len(form)) // 2)]
