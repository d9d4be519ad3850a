"""The pass ``freeze_linears``: rewrites linears with frozen weights to frozen linears."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from slope_fx.ops.targets import (
    FROZEN_EXPAND,
    FROZEN_GROUPED_LINEAR,
    FROZEN_LINEAR,
    FROZEN_LINEAR_WITH_GRAD,
)
from slope_fx.passes.context import Context
from slope_fx.passes.graph import arguments, emit, is_row, rank_of, replace, value_of
from slope_fx.passes.linears import LinearCall, find_linears
from slope_fx.passes.markers import marked_read, rows
from slope_fx.passes.views import Read


def freeze_linears(gm: GraphModule, context: Context) -> int:
    """Rewrites ``linear(x, frozen_expand(values, ...), b)`` to ``frozen_linear(x, values, ...)``.

    A layer with the forward of ``nn.Linear`` calls ``frozen_linear`` itself. This pass is for all
    other code that reads a frozen weight, such as torch's attention. The linear may read some rows
    of the weight, or a stack of weights: then it becomes a ``frozen_grouped_linear``. A linear that
    trains a stack of adapters of PEFT stays expanded. Returns the number of rewritten linears.
    """
    matches = 0
    for call in find_linears(gm):
        found = marked_read(call)
        if call.build is not None or found is None:
            continue
        view, read = found
        if view.source.target is not FROZEN_EXPAND or view.dtypes:
            continue
        marker = arguments(view.source)
        of_a = _rows_of_a(marker, read, value_of(view.source))
        stacked, trains = rank_of(call.weight) == 3, _trains(call, context)
        if of_a is None or (stacked and (trains or call.bias is not None)):
            continue
        names = ("values", "forward_mask", "scales", "lora_A", "lora_B")
        operands = (call.x, call.bias, call.offsets, *(marker[name] for name in names))
        op = FROZEN_LINEAR_WITH_GRAD if trains else FROZEN_LINEAR
        if stacked:
            op = FROZEN_GROUPED_LINEAR
        form, whole = tuple(marker["form"]), value_of(view.source)
        build = _frozen(call, read, form, whole, of_a, op)
        replace(call.node, emit(call.node, build, *operands))
        matches += 1
    return matches


def _trains(call: LinearCall, context: Context) -> bool:
    operands = [node for node in (call.x, call.bias) if node is not None]
    return context.training and any(
        getattr(value_of(node), "requires_grad", False) for node in operands
    )


def _rows_of_a(marker: Any, read: Read, whole: object) -> tuple[int, int, int] | None:
    """The rows of A that belong to the rows of the weight that are read, and all rows of A.

    A stack has an A for each of its weights. None if a product reads several weights of a stack as
    one matrix, or a part of each.
    """
    if marker["lora_A"] is None:
        return 0, 0, 0
    a, b = (value_of(marker[name]) for name in ("lora_A", "lora_B"))
    if not (isinstance(whole, Tensor) and isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None
    rank, each = b.shape[1], whole.shape[0] * b.shape[1] // a.shape[0]
    first, last = read.start // each, -(-read.stop // each)
    complete = read.start % each == 0 and read.stop % each == 0
    if last - first != read.groups or (read.groups > 1 and not complete):
        return None
    return first * rank, last * rank, a.shape[0]


def _frozen(
    call: LinearCall,
    read: Read,
    form: tuple[int, ...],
    whole: object,
    of_a: tuple[int, int, int],
    op: Any,
) -> Any:
    assert isinstance(whole, Tensor)
    total, fused = whole.shape[0], call.bias is None or is_row(call.bias)

    def build(
        x: Any, bias: Any, offsets: Any, values: Any, mask: Any, scales: Any, a: Any, b: Any
    ) -> Any:
        values, mask, scales, b = (
            t if t is None else rows(t, read.start, read.stop, total)
            for t in (values, mask, scales, b)
        )
        a = a if a is None else rows(a, *of_a)
        if op is FROZEN_GROUPED_LINEAR:
            return op(x, values, mask, scales, a, b, offsets, read.groups, list(form))
        added = bias if fused else None
        y = op(x, values, mask, scales, added, a, b, list(form))
        return y if fused else torch.add(y, bias)

    return build
