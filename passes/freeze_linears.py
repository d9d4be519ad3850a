"""The pass ``freeze_linears``: rewrites linears with frozen weights to frozen linears."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from slope_fx.ops.targets import FROZEN_EXPAND, FROZEN_LINEAR, FROZEN_LINEAR_WITH_GRAD
from slope_fx.passes.context import Context
from slope_fx.passes.graph import arguments, emit, rank_of, replace, value_of
from slope_fx.passes.linears import LinearCall, find_linears
from slope_fx.passes.markers import marked_read, rows
from slope_fx.passes.views import Read


def freeze_linears(gm: GraphModule, context: Context) -> int:
    """Rewrites ``linear(x, frozen_expand(values, ...), b)`` to ``frozen_linear(x, values, ...)``.

    A layer with the forward of ``nn.Linear`` calls ``frozen_linear`` itself. This pass is for all
    other code that reads a frozen weight, such as torch's attention. The linear may read some rows
    of the weight. A stack of weights stays expanded. Returns the number of rewritten linears.
    """
    matches = 0
    for call in find_linears(gm):
        found = marked_read(call)
        if call.build is not None or found is None or rank_of(call.weight) == 3:
            continue
        view, read = found
        if view.source.target is not FROZEN_EXPAND or view.dtype is not None:
            continue
        marker = arguments(view.source)
        names = ("values", "forward_mask", "scales", "lora_A", "lora_B")
        operands = (call.x, call.bias, *(marker[name] for name in names))
        build = _frozen(call, read, tuple(marker["form"]), value_of(view.source), context)
        replace(call.node, emit(call.node, build, *operands))
        matches += 1
    return matches


def _frozen(
    call: LinearCall, read: Read, form: tuple[int, ...], whole: object, context: Context
) -> Any:
    assert isinstance(whole, Tensor)
    total, bias_rank = whole.shape[0], 1 if call.bias is None else rank_of(call.bias)
    operands = [node for node in (call.x, call.bias) if node is not None]
    trains = context.training and any(
        getattr(value_of(node), "requires_grad", False) for node in operands
    )
    op = FROZEN_LINEAR_WITH_GRAD if trains else FROZEN_LINEAR

    def build(x: Any, bias: Any, values: Any, mask: Any, scales: Any, a: Any, b: Any) -> Any:
        values, mask, scales, b = (
            t if t is None else rows(t, read.start, read.stop, total)
            for t in (values, mask, scales, b)
        )
        added = bias if bias_rank == 1 else None
        y = op(x, values, mask, scales, added, a, b, list(form))
        return y if added is bias else torch.add(y, bias)

    return build
