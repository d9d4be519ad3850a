"""Run the passes on a graph and its nested graphs."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

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
"""The argument of ``sparse_linear`` with the engine's name, by product."""


@dataclass(frozen=True)
class PassReport:
    """The result of one pass on a graph and its nested graphs.

    Attributes:
        name: name of the pass.
        matches: number of matches, the rewritten places.
        expected: number of expected matches; 0 if unknown.
        nodes_before, nodes_after: number of nodes in all graphs.
    """

    name: str
    matches: int
    expected: int
    nodes_before: int
    nodes_after: int

    @property
    def missed(self) -> bool:
        """Whether the pass expected matches and had none."""
        return self.expected > 0 and self.matches == 0


@dataclass(frozen=True)
class Leftover:
    """A marker that no pass rewrote. Its layer runs with its dense weight rebuilt.

    Attributes:
        gm: the graph with the marker.
        mask: the node of the packed forward mask, which identifies the layer.
        used_by: names of the ops that read the expanded weight, or write to it.
    """

    gm: GraphModule
    mask: Node
    used_by: tuple[str, ...]


@dataclass(frozen=True)
class SparseCall:
    """A sparse linear in a rewritten graph.

    Attributes:
        gm: the graph with the node.
        mask: the node of the packed forward mask, which identifies the layer.
        request: the request for which its engines were chosen.
        products: names of the ops of the products that the graph or its gradient computes.
    """

    gm: GraphModule
    mask: Node
    request: Request
    products: tuple[str, ...]


@dataclass(frozen=True)
class Rewrites:
    """The result of all passes on a graph and its nested graphs.

    Attributes:
        reports: the result of each pass, in order.
        leftovers: the markers that no pass rewrote.
        calls: the sparse linears.
        writes: the markers that the graph writes to. If there are any, no pass ran.
    """

    reports: tuple[PassReport, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    calls: tuple[SparseCall, ...] = ()
    writes: tuple[Leftover, ...] = ()

    def matches(self, name: str) -> int:
        """The number of matches of the named pass; 0 if it did not run."""
        return sum(report.matches for report in self.reports if report.name == name)


def run_passes(
    gm: GraphModule,
    context: Context | None = None,
    disabled: Collection[str] = (),
    passes: Sequence[Pass] = PASSES,
) -> Rewrites:
    """Run the passes on ``gm`` and all its nested graphs, in place.

    A second run changes nothing. Each pass logs its number of matches (``TORCH_LOGS="+slope_fx"``).
    PyTorch's structured trace (``TORCH_TRACE=folder``) gets the graph before the passes, and after
    each pass with matches.

    Args:
        gm: a Dynamo graph.
        context: the context; None for the current context.
        disabled: names of passes to skip.
        passes: the passes, in order.
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
        with context.cast():
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
    """The context of each graph. A nested graph has the context of the node that calls it."""
    found = {gm: context}
    for node, nested, _ in nested_calls(gm):
        here = context.at(node)
        if found.setdefault(nested, here) != here:
            here = replace(here, certain=False)
        found.update(_contexts(nested, here))
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
        expanded = arguments(marker)["weight"] if marker.target is ADD_ADAPTER else marker
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
    """The nodes that read the expanded weight ``node``, directly or through views and adapters."""
    readers = set()
    for user in node.users:
        through = user.target is ADD_ADAPTER or is_view(user)
        readers |= _readers(user) if through else {user}
    return readers
