"""The list of passes in their order, with the reasons for the order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from slope_fx.ops.targets import ADD_ADAPTER, EXPAND
from slope_fx.passes.context import Context
from slope_fx.passes.decompose_attention import decompose_attention, is_attention
from slope_fx.passes.insert_adapters import insert_adapters
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
        "merges equal markers, drops those that nothing reads",
        "first, so that what comes after looks at each weight once",
    ),
    Pass(
        "decompose_attention",
        decompose_attention,
        "opens torch's own attention, plain and fused, into linears and what is between them",
        "before any pass that looks for linears: these are hidden in one call",
        _attention_calls,
    ),
    Pass(
        "normalize_linears",
        normalize_linears,
        "writes matmul, addmm, einsum, convolutions of one pixel and so on as F.linear or bmm",
        "before those that know only these forms",
    ),
    Pass(
        "insert_adapters",
        insert_adapters,
        "puts the low-rank branch beside the product, in the adapter phase",
        "takes the adapter out of the weight, so that what is left is an expanded weight",
        _marked(ADD_ADAPTER),
    ),
    Pass(
        "sparsify_linears",
        sparsify_linears,
        "turns a linear over an expanded weight into the sparse linear, and chooses its engine",
        "when all linears over expanded weights are in plain form, in either phase",
        _marked(EXPAND),
    ),
)
NAMES = tuple(p.name for p in PASSES)
