"""The list of passes in their order, with the reasons for the order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from slope_fx.ops.targets import ADD_ADAPTER, EXPAND, FROZEN_EXPAND
from slope_fx.passes.context import Context
from slope_fx.passes.decompose_attention import decompose_attention, is_attention
from slope_fx.passes.freeze_linears import freeze_linears
from slope_fx.passes.insert_adapters import insert_adapters
from slope_fx.passes.join_linears import join_linears
from slope_fx.passes.markers import is_marked, markers
from slope_fx.passes.normalize_linears import normalize_linears
from slope_fx.passes.prune_expands import prune_expands
from slope_fx.passes.sparsify_linears import sparsify_linears

Run = Callable[[GraphModule, Context], int]


@dataclass(frozen=True)
class Pass:
    """An entry of the registry.

    Attributes:
        name: name of the pass, as in ``disable_passes``.
        run: changes one graph in place, without its nested graphs, and returns the number of
            matches.
        does: what the pass rewrites.
        here: why the pass has its place in the order.
        expects: counts the nodes that the pass should match. If the count is not 0, the pass
            should have at least one match.
    """

    name: str
    run: Run
    does: str
    here: str
    expects: Callable[[GraphModule], int] = lambda gm: 0


def _attention_calls(gm: GraphModule) -> int:
    calls = (node for node in gm.graph.nodes if is_attention(node))
    return sum(any(map(is_marked, node.all_input_nodes)) for node in calls)


def _marked(target: Any) -> Callable[[GraphModule], int]:
    return lambda gm: sum(node.target is target for node in markers(gm))


PASSES: tuple[Pass, ...] = (
    Pass(
        "prune_expands",
        prune_expands,
        "merges equal markers, and erases unused markers",
        "first, so that later passes see each weight once",
    ),
    Pass(
        "decompose_attention",
        decompose_attention,
        "decomposes torch's attention, plain and fused, into linears and other ops",
        "before the passes that match linears, because one call hides these linears",
        _attention_calls,
    ),
    Pass(
        "normalize_linears",
        normalize_linears,
        "rewrites matmul, addmm, einsum, convolutions of one pixel etc. to F.linear or bmm",
        "before the passes that match only these forms",
    ),
    Pass(
        "insert_adapters",
        insert_adapters,
        "in the adapter phase, computes the adapter as a low-rank branch",
        "before `sparsify_linears`, which matches expanded weights without adapters",
        _marked(ADD_ADAPTER),
    ),
    Pass(
        "sparsify_linears",
        sparsify_linears,
        "rewrites a linear with an expanded weight to the sparse linear, and chooses its engine",
        "when all linears with expanded weights have plain form, in both phases",
        _marked(EXPAND),
    ),
    Pass(
        "freeze_linears",
        freeze_linears,
        "rewrites a linear with a frozen weight to the frozen linear",
        "as `sparsify_linears`; a model has weights for one of the two",
        _marked(FROZEN_EXPAND),
    ),
    Pass(
        "join_linears",
        join_linears,
        "computes frozen linears with the same input in one call",
        "last, when all frozen linears are there",
    ),
)
NAMES = tuple(p.name for p in PASSES)
