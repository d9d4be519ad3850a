"""Runs the passes over a graph and the graphs nested in it."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from slope_fx.ops.targets import (
    ADD_ADAPTER,
    EXPAND,
    SPARSE_GROUPED_LINEAR,
    SPARSE_LINEAR,
)
from slope_fx.passes.context import Context
from slope_fx.passes.find_writes import find_writes
from slope_fx.passes.graph import graphs_of, value_of
from slope_fx.passes.record import PassReport, Recorder, node_count
from slope_fx.passes.registry import PASSES, Pass
from slope_fx.passes.views import is_view

log = logging.getLogger(__name__)

Size = tuple[int, int, int, int]


@dataclass(frozen=True)
class Leftover:
    """A marker that no pass can rewrite: its layer runs with a dense weight, if at all.

    Attributes:
        gm: the graph that holds it.
        values: the node of the layer's values.
        used_by: the ops that read the expanded weight, or write to it.
    """

    gm: GraphModule
    values: Node
    used_by: tuple[str, ...]


@dataclass(frozen=True)
class Rewrites:
    """What the passes did to a graph and the graphs nested in it.

    Attributes:
        reports: what each did, in the order they ran.
        leftovers: the markers that are left.
        weights: (d_out, d_in, N, M) of the sparse linears.
        writes: the markers that the graph writes to, and by what. If there is one, no pass ran.
    """

    reports: tuple[PassReport, ...]
    leftovers: tuple[Leftover, ...]
    weights: frozenset[Size]
    writes: tuple[Leftover, ...] = ()

    def matches(self, name: str) -> int:
        """How many places the pass of that name rewrote; 0 if it didn't run."""
        return sum(report.matches for report in self.reports if report.name == name)


def run_passes(
    gm: GraphModule,
    context: Context | None = None,
    disabled: Collection[str] = (),
    recorder: Recorder | None = None,
    passes: Sequence[Pass] = PASSES,
) -> Rewrites:
    """Run the passes over ``gm`` and every graph nested in it, in place.

    Running them again changes nothing.

    Args:
        gm: a Dynamo graph.
        context: the circumstances; None for those now.
        disabled: names of passes to leave out.
        recorder: writes down each step.
        passes: which, in their order.
    """
    context = context or Context.here()
    with context.in_force():
        return _run(gm, context, disabled, recorder, passes)


def _run(
    gm: GraphModule,
    context: Context,
    disabled: Collection[str],
    recorder: Recorder | None,
    passes: Sequence[Pass],
) -> Rewrites:
    writes = tuple(write for graph_module in graphs_of(gm) for write in _writes(graph_module))
    if writes:
        return Rewrites((), (), frozenset(), writes)
    if recorder:
        recorder.start(gm)
    reports = []
    for step in passes:
        if step.name in disabled:
            continue
        before, expected, matches = node_count(gm), 0, 0
        for graph_module in graphs_of(gm):
            expected += step.expects(graph_module)
            found = step.run(graph_module, context)
            if found:
                graph_module.graph.lint()
                graph_module.recompile()
            matches += found
        report = PassReport(step.name, matches, expected, before, node_count(gm))
        reports.append(report)
        log.debug("%s: %d matches, %d nodes to %d", step.name, matches, before, report.nodes_after)
        if report.missed:
            log.info("%s matched none of the %d that it was there for", step.name, expected)
        if recorder:
            recorder.after(gm, report)
    if recorder:
        recorder.finish(tuple(reports))
    leftovers = [left for graph_module in graphs_of(gm) for left in _leftovers(graph_module)]
    weights = frozenset().union(*(_sparse_weights(g) for g in graphs_of(gm)))
    log.info(
        "%s; left expanded %d",
        ", ".join(f"{r.name} {r.matches}" for r in reports), len(leftovers),
    )  # fmt: skip
    return Rewrites(tuple(reports), tuple(leftovers), weights)


def _sparse_weights(gm: GraphModule) -> set[Size]:
    found = set()
    for node in gm.graph.nodes:
        place = _PATTERN_AT.get(node.target) if node.op == "call_function" else None
        if place is None:
            continue
        groups = node.args[5] if node.target is SPARSE_GROUPED_LINEAR else 1
        n, m = node.args[place : place + 2]
        weights = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
        for value in map(value_of, weights):
            if isinstance(value, Tensor):
                found.add((int(value.shape[0]) // groups, int(value.shape[1]) * m // n, n, m))
    return found


_PATTERN_AT: dict[object, int] = {
    SPARSE_LINEAR: 5,
    SPARSE_GROUPED_LINEAR: 6,
}
"""Where these ops have n and m."""


def _writes(gm: GraphModule) -> list[Leftover]:
    found: dict[Node, list[str]] = {}
    for marker, name in find_writes(gm):
        values: Any = marker.args[0] if marker.target is EXPAND else marker.args[0].args[0]  # type: ignore[union-attr]
        found.setdefault(values, []).append(name)
    return [Leftover(gm, values, tuple(names)) for values, names in found.items()]


def _leftovers(gm: GraphModule) -> list[Leftover]:
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=EXPAND):
        values = node.args[0]
        assert isinstance(values, Node)
        names = {getattr(u.target, "__name__", str(u.target)) for u in _readers(node)}
        if names:
            found.append(Leftover(gm, values, tuple(sorted(names))))
    return found


def _readers(node: Node) -> set[Node]:
    """What reads the weight that ``node`` rebuilds, its views and its adapter aside."""
    readers = set()
    for user in node.users:
        through = user.target is ADD_ADAPTER or is_view(user)
        readers |= _readers(user) if through else {user}
    return readers
