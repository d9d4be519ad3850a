"""The pass ``insert_adapters``: computes adapters as low-rank branches."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from slope_fx.ops.targets import ADD_ADAPTER
from slope_fx.passes.context import Context
from slope_fx.passes.graph import arguments, emit, rank_of, replace, value_of
from slope_fx.passes.linears import LinearCall, find_linears
from slope_fx.passes.markers import marked_read, rows
from slope_fx.passes.views import Read, View


def insert_adapters(gm: GraphModule, context: Context) -> int:
    """Rewrites ``linear(x, add_adapter(W, A, B, s), b)`` to ``linear(x, W, b) + (s x A^T) B^T``.

    The scale multiplies the narrow product. It is not the ``alpha`` of the addition, because
    Inductor drops ``alpha`` when it fuses the addition and a 2-d product into ``addmm``
    (pytorch#167313).

    The pass changes only ``gm`` itself, not its nested graphs. It does not change the linear with
    ``W``, which ``sparsify_linears`` rewrites later. Returns the number of inserted branches.
    """
    matches = 0
    for call in find_linears(gm):
        found = marked_read(call)
        if call.build is not None or found is None or found[0].source.target is not ADD_ADAPTER:
            continue
        part = _part(*found)
        if part is None:
            continue
        marker = arguments(found[0].source)
        factors = marker["lora_a"], marker["lora_b"], marker["scale"]
        build = _branch(call, found[0], found[1], part)
        # The scale is an operand too: Dynamo makes it a graph input if layers with the same code
        # have different scales.
        operands = (call.x, marker["weight"], *factors, call.bias, call.offsets)
        replace(call.node, emit(call.node, build, *operands))
        matches += 1
    return matches


_ALIGNED = 8
"""Columns. torch's grouped products require rows of a multiple of 16 bytes."""


class _Part:
    """The part of a stack of adapters for a range of rows of the weight."""

    def __init__(self, stack: int, rank: int, d_out: int, read: Read) -> None:
        self.stack, self.rank, self.d_out, self.read = stack, rank, d_out, read
        self.first, self.last = read.start // d_out, -(-read.stop // d_out)
        self.blocks = self.last - self.first
        aligned = not (read.start % d_out or read.stop % d_out)
        self.known = self.blocks == 1 or (aligned and read.groups in (1, self.blocks))


def _part(view: View, read: Read) -> _Part | None:
    marker = arguments(view.source)
    a, b = value_of(marker["lora_a"]), value_of(marker["lora_b"])
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    if len(view.dtypes) > 1:
        return None  # the sum is rounded, which is not the sum of what is rounded
    stack = a.shape[0] // b.shape[1]
    part = _Part(stack, b.shape[1], b.shape[0] // stack, read)
    return part if part.known else None


def _branch(call: LinearCall, view: View, read: Read, part: _Part) -> Any:
    total = part.stack * part.d_out
    stacked = rank_of(call.weight) == 3

    def build(x: Any, weight: Any, a: Any, b: Any, scale: Any, bias: Any, offsets: Any) -> Any:
        weight = rows(weight, read.start, read.stop, total)
        a = rows(a, part.first * part.rank, part.last * part.rank, part.stack * part.rank)
        b = rows(b, read.start, read.stop, total)
        weight, a, b = (view.cast(t) for t in (weight, a, b))
        if not stacked:
            down = F.linear(x, a) * scale
            if part.blocks == 1:
                up = F.linear(down, b)
            else:  # a stack of matrices with one input: each block of rows has its own adapter
                down = down.unflatten(-1, (part.blocks, part.rank)).unsqueeze(-2)
                up = (down @ b.unflatten(0, (part.blocks, -1)).mT).squeeze(-2).flatten(-2)
            return F.linear(x, weight, bias) + up
        b = b.unflatten(0, (read.groups, -1))
        weight = weight.unflatten(0, (read.groups, -1))
        several = part.blocks == read.groups
        a = a.unflatten(0, (read.groups, -1)) if several else a
        if offsets is not None and part.rank % _ALIGNED:
            more = -part.rank % _ALIGNED
            a, b = F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))
        down = _times(call, x, a, offsets) if several else F.linear(x, a)
        return _times(call, x, weight, offsets) + _times(call, down * scale, b, offsets)

    return build


def _times(call: LinearCall, x: Any, weight: Any, offsets: Any) -> Any:
    """The product of ``call`` with another stack of weights (groups, d_out, d_in)."""
    if offsets is None:
        return torch.bmm(x, weight.mT)
    target: Any = call.node.target
    return target(x, weight.mT, offs=offsets)
