"""Runs the passes over a graph and the graphs nested in it."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch._logging._internal import trace_structured
from torch.fx import GraphModule, Node

from slope_fx.kernels.selection import Request
from slope_fx.ops.targets import ADD_ADAPTER, EXPAND, SPARSE_LINEAR
from slope_fx.passes.context import Context
from slope_fx.passes.find_writes import find_writes
from slope_fx.passes.graph import arguments, graphs_of, nested_calls
from slope_fx.passes.registry import PASSES, Pass
from slope_fx.passes.sparsify_linears import request_for
from slope_fx.passes.views import is_view, source_of

log = logging.getLogger(__name__)

ENGINE_OF = {
    "sparse_linear": "engine",
    "sparse_input_grad": "input_engine",
    "sparse_weight_grad": "weight_engine",
}
"""The argument of the sparse linear that names the engine of each product."""


@dataclass(frozen=True)
class PassReport:
    """What one pass did to a graph and the graphs nested in it.

    Attributes:
        name: of the pass.
        matches: how many places it rewrote.
        expected: how many places there were for it; 0 where that isn't known beforehand.
        nodes_before, nodes_after: of all the graphs.
    """

    name: str
    matches: int
    expected: int
    nodes_before: int
    nodes_after: int

    @property
    def missed(self) -> bool:
        """Whether it matched nothing, where there was something."""
        return self.expected > 0 and self.matches == 0


@dataclass(frozen=True)
class Leftover:
    """A marker that no pass rewrote: its layer runs with a dense weight, if at all.

    Attributes:
        gm: the graph that holds it.
        mask: the node of the layer's packed forward mask, which tells the layer.
        used_by: the ops that read the expanded weight, or write to it.
    """

    gm: GraphModule
    mask: Node
    used_by: tuple[str, ...]


@dataclass(frozen=True)
class SparseCall:
    """A sparse linear in a rewritten graph.

    Attributes:
        gm: the graph that holds it.
        mask: the node of the layer's packed forward mask, which tells the layer.
        request: what the choice of its engines depended on.
        products: the products that the graph computes or differentiates, by name of the op.
    """

    gm: GraphModule
    mask: Node
    request: Request
    products: tuple[str, ...]


@dataclass(frozen=True)
class Rewrites:
    """What the passes did to a graph and the graphs nested in it.

    Attributes:
        reports: what each pass did, in the order they ran.
        leftovers: the markers that are left.
        calls: the sparse linears.
        writes: the markers that the graph writes to, and by what. If there is one, no pass ran.
    """

    reports: tuple[PassReport, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    calls: tuple[SparseCall, ...] = ()
    writes: tuple[Leftover, ...] = ()

    def matches(self, name: str) -> int:
        """How many places the pass of that name rewrote; 0 if it didn't run."""
        return sum(report.matches for report in self.reports if report.name == name)


def run_passes(
    gm: GraphModule,
    context: Context | None = None,
    disabled: Collection[str] = (),
    passes: Sequence[Pass] = PASSES,
) -> Rewrites:
    """Run the passes over ``gm`` and every graph nested in it, in place.

    Running them again changes nothing. Each pass logs its counts (``TORCH_LOGS="+slope_fx"``).
    PyTorch's structured trace (``TORCH_TRACE=folder``) gets the graph ahead of the passes and after
    each pass that changed it.

    Args:
        gm: a Dynamo graph.
        context: the circumstances; None for those now.
        disabled: names of passes to leave out.
        passes: which, in their order.
    """
    context = context or Context.here()
    with context.in_force():
        return _run(gm, context, disabled, passes)


def _run(
    gm: GraphModule, context: Context, disabled: Collection[str], passes: Sequence[Pass]
) -> Rewrites:
    writes = tuple(write for graph_module in graphs_of(gm) for write in _writes(graph_module))
    if writes:
        return Rewrites(writes=writes)
    contexts = _contexts(gm, context)
    _trace("before_passes", gm)
    reports = []
    for step in passes:
        if step.name in disabled:
            continue
        reports.append(_run_one(gm, step, contexts))
    leftovers = [left for graph_module in contexts for left in _leftovers(graph_module)]
    calls = [call for graph, here in contexts.items() for call in _calls(graph, here)]
    counts = ", ".join(f"{r.name} {r.matches}" for r in reports)
    log.info("%s; left expanded %d", counts, len(leftovers))
    return Rewrites(tuple(reports), tuple(leftovers), tuple(calls))


def _run_one(gm: GraphModule, step: Pass, contexts: dict[GraphModule, Context]) -> PassReport:
    before, expected, matches = _nodes(gm), 0, 0
    for graph_module, context in contexts.items():
        expected += step.expects(graph_module)
        found = step.run(graph_module, context)
        if found:
            graph_module.graph.lint()
            graph_module.recompile()
        matches += found
    report = PassReport(step.name, matches, expected, before, _nodes(gm))
    log.debug("%s: %d matches, %d nodes to %d", step.name, matches, before, report.nodes_after)
    if report.missed:
        log.info("%s matched none of the %d places for it", step.name, expected)
    if matches:
        _trace(f"after_{step.name}", gm)
    return report


def _contexts(gm: GraphModule, context: Context) -> dict[GraphModule, Context]:
    """The circumstances of each graph: those of the node that calls it, for a nested graph."""
    found = {gm: context}
    for outer in found.copy():
        for node, nested, _ in nested_calls(outer):
            if nested not in found:
                found.update(_contexts(nested, context.at(node)))
    return {graph: found.get(graph, context) for graph in graphs_of(gm)}


def _trace(name: str, gm: GraphModule) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"slope_fx_{name}", "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False),
        expect_trace_id=False,
    )


def _nodes(gm: GraphModule) -> int:
    return sum(len(graph_module.graph.nodes) for graph_module in graphs_of(gm))


def _calls(gm: GraphModule, context: Context) -> list[SparseCall]:
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=SPARSE_LINEAR):
        call, request = arguments(node), request_for(node, context)
        if request is not None:
            products = tuple(op for op, name in ENGINE_OF.items() if call[name])
            found.append(SparseCall(gm, source_of(call["forward_mask"]), request, products))
    return found


def _writes(gm: GraphModule) -> list[Leftover]:
    found: dict[Node, list[str]] = {}
    for marker, name in find_writes(gm):
        expanded = marker if marker.target is EXPAND else arguments(marker)["weight"]
        found.setdefault(arguments(expanded)["forward_mask"], []).append(name)
    return [Leftover(gm, mask, tuple(names)) for mask, names in found.items()]


def _leftovers(gm: GraphModule) -> list[Leftover]:
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=EXPAND):
        names = {getattr(u.target, "__name__", str(u.target)) for u in _readers(node)}
        if names:
            found.append(Leftover(gm, arguments(node)["forward_mask"], tuple(sorted(names))))
    return found


def _readers(node: Node) -> set[Node]:
    """What reads the weight that ``node`` rebuilds, its views and its adapter aside."""
    readers = set()
    for user in node.users:
        through = user.target is ADD_ADAPTER or is_view(user)
        readers |= _readers(user) if through else {user}
    return readers
