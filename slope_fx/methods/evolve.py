"""Masks that evolve on compressed weights."""

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from slope_fx import ops
from slope_fx.kernels.errors import UnsupportedError
from slope_fx.kernels.packing import pack, unpack
from slope_fx.methods.method import Method, is_within
from slope_fx.ops.weights import expand_with_probe

if TYPE_CHECKING:
    from slope_fx.sparse.weight import SparseWeight


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evolve(Method):
    """SLoPe, whose forward mask moves to where the gradient is.

    In each ``interval``-th step all products are dense, and the gradient of the pruned elements is
    computed too. After the step, the groups with the largest ratio of it to their weakest kept
    element swap the two. A new element begins at 0. Its first moment is 0, and its second is the
    mean of its group, so that its first steps are small: the optimizer has one count of steps
    for all elements, and its bias correction is over.

    Attributes:
        interval: number of steps between swaps.
        rate: the fraction of the groups that swap, at first. It falls to zero with a cosine.
        end: the fraction of the steps after which the masks are kept.
    """

    name: ClassVar[str] = "evolve"
    source: ClassVar[str] = "slope_fx; after RigL, arXiv 1911.11134"
    steps: ClassVar[bool] = True
    interval: int = 100
    rate: float = 0.1
    end: float = 0.75

    def __post_init__(self) -> None:
        whole = isinstance(self.interval, int) and is_within(self.interval, 1, math.inf)
        self.check("interval", whole, "a whole number of steps from 1 up")
        self.check("rate", is_within(self.rate, 0, 1), "a fraction of the groups from 0 to 1")
        self.check("end", is_within(self.end, 0, 1), "a fraction of the steps from 0 to 1")

    def weight(self, weight: "SparseWeight", kept: Tensor, masks: tuple[Tensor, Tensor]) -> Tensor:
        if weight.probe is None:
            return super().weight(weight, kept, masks)
        dense: Tensor = expand_with_probe(kept, weight.probe, masks[0], weight.n, weight.m)
        return dense

    def prepare(self, weight: "SparseWeight", step: int, total_steps: int) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise UnsupportedError(
                f'{weight.name}: method="evolve" runs on one process, and there are '
                f"{dist.get_world_size()}: ranks would move their masks apart."
            )
        weight.probe = None
        if (step + 1) % self.interval or step + 1 > self.end * total_steps:
            return
        rows, pruned = weight.values.shape[0], weight.d_in * (weight.m - weight.n) // weight.m
        weight.probe = weight.values.new_zeros(rows, pruned).requires_grad_()
        turn = math.cos(math.pi * (step + 1) / (self.end * total_steps))
        weight.swaps = self.rate * 0.5 * (1 + turn)

    @torch.no_grad()
    def after_step(self, weight: "SparseWeight") -> None:
        if weight.probe is None or weight.probe.grad is None:
            return
        if not weight.probe.grad.isfinite().all():
            log.info("%s: no swap, the gradient is not finite", weight.name)
            return
        values, bits = weight.values, weight.forward_bits
        n, m, rows, d_in = weight.n, weight.m, values.shape[0], weight.d_in
        mask = unpack(bits, d_in)
        gradient = ops.expand(weight.probe.grad, pack(~mask), pack(~mask), m - n, m).float()
        groups = (rows, d_in // m, m)
        magnitude = ops.expand(values, bits, bits, n, m).abs().float().view(groups)
        weakest, drop = magnitude.masked_fill(~mask.view(groups), math.inf).min(-1)
        strongest, grow = gradient.abs().view(groups).masked_fill(mask.view(groups), -1).max(-1)
        score = (strongest / weakest.clamp_min(torch.finfo(torch.float32).tiny)).flatten()
        count = round(weight.swaps * score.numel())
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen[score.topk(count).indices] = True
        moved = mask.view(groups).clone()
        swapped = chosen.view(rows, -1, 1)
        moved.scatter_(-1, drop.unsqueeze(-1), moved.gather(-1, drop.unsqueeze(-1)) & ~swapped)
        moved.scatter_(-1, grow.unsqueeze(-1), moved.gather(-1, grow.unsqueeze(-1)) | swapped)
        weight.move_values(pack(moved.view(rows, d_in)))
