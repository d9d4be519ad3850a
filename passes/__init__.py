"""The passes, which rewrite FX graphs.

A pass is a function of a GraphModule, in a separate file. It uses graphs and ops, but no modules.

- ``registry.py`` lists the passes in order, with reasons. ``run.py`` runs them.
- ``graph.py``, ``views.py``, ``linears.py`` and ``markers.py`` are shared: they handle nodes,
  views of weights, the forms of linears, and the markers of compressed weights.
- ``weight_roles.py`` and ``graph_kinds.py`` analyze the exported graph of a model, once, when
  ``compile`` is called.
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
