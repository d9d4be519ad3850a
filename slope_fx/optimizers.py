"""What is said and done at each optimizer's step, for the optimizers of sparse weights."""

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from slope_fx.errors import ArgumentError, ScheduleWarning
from slope_fx.masks import Mask
from slope_fx.reading import note_step
from slope_fx.weights import SparseWeight, find_alive


@functools.cache
def watch() -> None:
    """Look at every optimizer's step in this process from now on."""
    register_optimizer_step_pre_hook(torch.compiler.disable(_begins))


def _begins(optimizer: Optimizer, *_: object) -> None:
    note_step()
    idle = find_alive(lambda weight: weight.rank is not None and not weight.adapter_active)
    asleep = {id(factor) for weight in idle for factor in (weight.lora_A, weight.lora_B)}
    for parameter in _parameters(optimizer):
        if id(parameter) in asleep:
            # An adapter that takes no part gets no step though its gradients were set to zeros: by
            # zero_grad(set_to_none=False), or by torch.distributed.checkpoint, which makes the
            # state of a new optimizer so, and asks for one of each parameter: an empty one.
            parameter.grad = None
            optimizer.state[parameter]
    _tell_of_missing_schedule(optimizer, idle)
    if isinstance(optimizer, LBFGS) and any(isinstance(p, Mask) for p in _parameters(optimizer)):
        raise ArgumentError(
            "LBFGS moves every parameter that it holds, and it holds masks. Give it those that "
            "train: LBFGS([p for p in model.parameters() if p.requires_grad])."
        )


def _tell_of_missing_schedule(optimizer: Optimizer, idle: Iterable[SparseWeight]) -> None:
    """Say, once for a model, that its adapters will never take part."""
    without = [weight for weight in idle if weight.follows and not weight.told_of_schedule]
    if not without:
        return
    stepped = {id(p) for p in _parameters(optimizer) if p.grad is not None}
    trained = [weight for weight in without if id(weight.values) in stepped]
    for weight in trained:
        weight.told_of_schedule = True
    if trained:
        warnings.warn(
            f"{len(trained)} layers ({trained[0].name} and so on) have adapters, but no "
            "slope_fx.Schedule was made for their model, so the adapters never take part. Make "
            "slope_fx.Schedule(model, total_steps=...) ahead of training, and step it after the "
            "optimizer.",
            ScheduleWarning,
            stacklevel=4,
        )


def _parameters(optimizer: Optimizer) -> Iterable[Any]:
    return (p for group in optimizer.param_groups for p in group["params"])
