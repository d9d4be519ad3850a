"""The passes: graph in, graph out.

A pass is a plain function on a GraphModule, in a file of its own; it knows graphs and ops, never
modules. ``registry.py`` orders them and says why. ``graph.py``, ``views.py``, ``linears.py`` and
``markers.py`` are what they share: nodes, what a node reads of a weight, what a linear looks like,
what a compressed weight reads as. ``weight_roles`` and ``graph_kinds`` work on the exported
graph, once, when a model is compiled.
"""

if __name__ != "slope_fx.passes":
    raise ImportError(f"import this package as slope_fx.passes, not as {__name__!r}")

from slope_fx.passes.context import Context
from slope_fx.passes.graph_kinds import graph_kinds
from slope_fx.passes.linears import find_linears
from slope_fx.passes.registry import NAMES, PASSES, Pass
from slope_fx.passes.run import Leftover, PassReport, Rewrites, SparseCall, run_passes
from slope_fx.passes.weight_roles import WeightRole, weight_roles

__all__ = [
    "NAMES",
    "PASSES",
    "Context",
    "Leftover",
    "Pass",
    "PassReport",
    "Rewrites",
    "SparseCall",
    "WeightRole",
    "find_linears",
    "graph_kinds",
    "run_passes",
    "weight_roles",
]
