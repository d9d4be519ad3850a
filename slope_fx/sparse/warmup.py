"""The warm-up of adapters: their learning rate rises over the first steps that train them.

A parameter group asks for it by the key ``adapter_warmup``, the number of such steps. The hooks of
an optimizer's step set the rate of the group for the step alone, so any scheduler of learning rates
and any trainer can set it between steps. The number of steps so far is in the group as
``adapter_steps``: the optimizer's state_dict saves it.
"""

import weakref
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_changed: weakref.WeakKeyDictionary[Optimizer, list[tuple[dict[str, Any], Any, int]]] = (
    weakref.WeakKeyDictionary()
)
"""Of an optimizer in its step: the groups, with the rate and the key before the step."""


def begin_warmup(optimizer: Optimizer) -> None:
    """Set the rates of the adapters for a step that begins."""
    end_warmup(optimizer)  # the last step may have raised
    for group in optimizer.param_groups:
        steps, rate = group.get("adapter_warmup"), group.get("lr", 0.0)
        if not steps or all(p.grad is None for p in group["params"]):
            continue
        # torch.distributed.checkpoint takes a step with lr=0, to make an optimizer's state.
        if not isinstance(rate, Tensor) and rate == 0:
            continue
        taken = group["adapter_steps"] = group.get("adapter_steps", 0) + 1
        if taken >= steps:
            continue
        before = rate.clone() if isinstance(rate, Tensor) else rate
        _changed.setdefault(optimizer, []).append((group, before, steps))
        # An optimizer within this one, as of ZeRO or of a sharpness-aware step, must not do it too.
        group["adapter_warmup"] = 0
        if isinstance(rate, Tensor):
            rate.mul_(taken / steps)  # in place: a captured or compiled step holds this tensor
        else:
            group["lr"] = rate * (taken / steps)


def end_warmup(optimizer: Optimizer) -> None:
    """Set the rates that were there before the step."""
    for group, rate, steps in _changed.pop(optimizer, ()):
        group["adapter_warmup"] = steps
        if isinstance(rate, Tensor):
            group["lr"].copy_(rate)
        else:
            group["lr"] = rate
