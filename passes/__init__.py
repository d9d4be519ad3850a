"""The passes, and the one order they run in.

A pass is a plain function on a GraphModule, in a file of its own. It knows graphs and
ops, never modules. Over each Dynamo graph, and each graph nested in it, run

1. ``find_linears``: what there is to work on; changes nothing.
2. ``insert_adapters``: takes the adapter out of a weight, so that what is left
3. ``sparsify_linears``: sees a linear over an expanded weight in either phase.

``weight_roles`` works on the exported graph, once, when a model is compiled.
"""

if __name__ != "slope_fx.passes":
    raise ImportError(f"import this package as slope_fx.passes, not as {__name__!r}")

import logging
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from slope_fx.kernels.engines import AUTO
from slope_fx.ops.targets import ADD_ADAPTER, EXPAND, SPARSE_LINEAR
from slope_fx.passes.find_linears import find_linears
from slope_fx.passes.graph import graphs_of, value_of
from slope_fx.passes.insert_adapters import insert_adapters
from slope_fx.passes.sparsify_linears import sparsify_linears
from slope_fx.passes.weight_roles import WeightRole, weight_roles

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leftover:
    """A marker that no pass could rewrite: its layer runs with a dense weight.

    Attributes:
        gm: the graph that holds it.
        values: the node of the layer's values.
        used_by: the ops that read the expanded weight.
    """

    gm: GraphModule
    values: Node
    used_by: tuple[str, ...]


@dataclass(frozen=True)
class Rewrites:
    """What the passes did to a graph and the graphs nested in it.

    Attributes:
        linears, adapters, sparse_linears: how many were found, inserted, rewritten.
        leftovers: the markers that are left.
        weights: (d_out, d_in, N, M) of the sparse linears.
    """

    linears: int
    adapters: int
    sparse_linears: int
    leftovers: tuple[Leftover, ...]
    weights: frozenset[tuple[int, int, int, int]]


def run_passes(gm: GraphModule, engines: str = AUTO) -> Rewrites:
    """Run the passes over ``gm`` and every graph nested in it, in place.

    ``engines`` may compute the products: "auto", or names separated by commas. Running
    the passes again changes nothing.
    """
    linears = adapters = sparse_linears = 0
    leftovers: list[Leftover] = []
    weights: set[tuple[int, int, int, int]] = set()
    for graph_module in graphs_of(gm):
        found = sum(1 for _ in find_linears(graph_module))
        inserted = insert_adapters(graph_module)
        rewritten = sparsify_linears(graph_module, engines)
        if inserted or rewritten:
            graph_module.graph.lint()
            graph_module.recompile()
        linears += found
        adapters += inserted
        sparse_linears += rewritten
        left = _leftovers(graph_module)
        leftovers += left
        weights |= _sparse_weights(graph_module)
        log.debug(_COUNTS, graph_module.__class__.__name__, found, inserted, rewritten, len(left))
    log.info(_COUNTS, "in all", linears, adapters, sparse_linears, len(leftovers))
    return Rewrites(linears, adapters, sparse_linears, tuple(leftovers), frozenset(weights))


_COUNTS = "%s: find_linears %d, insert_adapters %d, sparsify_linears %d, left expanded %d"


def _sparse_weights(gm: GraphModule) -> set[tuple[int, int, int, int]]:
    found = set()
    for node in gm.graph.find_nodes(op="call_function", target=SPARSE_LINEAR):
        values, n, m = node.args[1], node.args[5], node.args[6]
        assert isinstance(values, Node)
        value = value_of(values)
        if isinstance(value, Tensor):
            found.add((int(value.shape[0]), int(value.shape[1]) * m // n, n, m))
    return found


def _leftovers(gm: GraphModule) -> list[Leftover]:
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=EXPAND):
        values = node.args[0]
        assert isinstance(values, Node)
        users = [
            user
            for direct in node.users
            for user in (direct.users if direct.target is ADD_ADAPTER else (direct,))
        ]
        used_by = tuple(sorted({getattr(u.target, "__name__", str(u.target)) for u in users}))
        if used_by:
            found.append(Leftover(gm, values, used_by))
    return found


__all__ = [
    "Leftover",
    "Rewrites",
    "WeightRole",
    "find_linears",
    "insert_adapters",
    "run_passes",
    "sparsify_linears",
    "weight_roles",
]
