"""Masks that evolve on compressed weights."""

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slope_fx import ops
from slope_fx.kernels.packing import pack, unpack
from slope_fx.methods.method import Method, WeightState, is_within
from slope_fx.ops.weights import expand_with_probe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evolve(Method):
    """SLoPe, whose forward mask moves to where the gradient is.

    In each ``interval``-th step all products are dense, and the gradient of the pruned elements is
    computed too. After the step, the groups with the largest ratio of it to their weakest kept
    element swap the two. A new element begins at 0. Its first moment is 0, and its second is the
    mean of its group, so that its first steps are small: the optimizer has one count of steps
    for all elements, and its bias correction is over.

    A probed gradient is as large as the pruned part. Processes in a DistributedDataParallel average
    it before a swap. Shards of it would need the whole gradients of all layers on each rank.

    Attributes:
        interval: number of steps between swaps.
        rate: the fraction of the groups that swap, at first. It falls to zero with a cosine.
        end: the fraction of the steps after which the masks are kept.
    """

    name: ClassVar[str] = "evolve"
    source: ClassVar[str] = "slope_fx; after RigL, arXiv 1911.11134"
    steps: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    interval: int = 100
    rate: float = 0.1
    end: float = 0.75

    def __post_init__(self) -> None:
        whole = isinstance(self.interval, int) and is_within(self.interval, 1, math.inf)
        self.check("interval", whole, "a whole number of steps from 1 up")
        self.check("rate", is_within(self.rate, 0, 1), "a fraction of the groups from 0 to 1")
        self.check("end", is_within(self.end, 0, 1), "a fraction of the steps from 0 to 1")

    def without_effect(self, total_steps: int) -> str:
        if any(self.probes(step, total_steps) for step in range(total_steps)):
            return ""
        return (
            f"its masks never move: interval={self.interval}, and they are kept from "
            f"{self.end * total_steps:g} of {total_steps} steps on"
        )

    def probes(self, step: int, total_steps: int) -> bool:
        return (step + 1) % self.interval == 0 and step + 1 <= self.end * total_steps

    def weight(self, kept: Tensor, read: WeightState) -> Tensor:
        if read.probe is None:
            return super().weight(kept, read)
        n, m = read.pattern.n, read.pattern.m
        dense: Tensor = expand_with_probe(kept, read.probe, read.forward_bits, n, m)
        return dense

    def moves(self, read: WeightState) -> bool:
        return read.probe is not None and read.probe.grad is not None

    def next_mask(self, kept: Tensor, read: WeightState, step: int, total_steps: int) -> Tensor:
        assert read.probe is not None
        assert read.probe.grad is not None
        if not read.probe.grad.isfinite().all():
            log.info("step %d: no swap, a gradient is not finite", step)
            return read.forward_bits
        n, m, bits = read.pattern.n, read.pattern.m, read.forward_bits
        rows, d_in = kept.shape[0], kept.shape[1] * m // n
        mask, groups = unpack(bits, d_in), (rows, d_in // m, m)
        pruned = pack(~mask)
        gradient = ops.expand(read.probe.grad, pruned, pruned, m - n, m).float().abs()
        magnitude = ops.expand(kept, bits, bits, n, m).abs().float()
        mask = mask.view(groups)
        weakest, drop = magnitude.view(groups).masked_fill(~mask, math.inf).min(-1, keepdim=True)
        strongest, grow = gradient.view(groups).masked_fill(mask, -1).max(-1, keepdim=True)
        score = (strongest / weakest.clamp_min(torch.finfo(torch.float32).tiny)).flatten()
        turn = math.cos(math.pi * step / (self.end * total_steps))
        count = round(self.rate * 0.5 * (1 + turn) * score.numel())
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen[score.topk(count).indices] = True
        chosen &= score > 0  # where no gradient came, as of an expert without tokens
        chosen = chosen.view(rows, -1, 1)
        mask = mask.scatter(-1, drop, mask.gather(-1, drop) & ~chosen)
        mask = mask.scatter(-1, grow, mask.gather(-1, grow) | chosen)
        return pack(mask.view(rows, d_in))
