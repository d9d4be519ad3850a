"""Checks at the steps of optimizers."""

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from slope_fx.errors import ArgumentError, TrainingWarning, users_stacklevel
from slope_fx.sparse.blank import settle
from slope_fx.sparse.mask import Mask
from slope_fx.sparse.steps import before_step
from slope_fx.sparse.trained import note_optimizer, note_trained
from slope_fx.sparse.warmup import begin_warmup, end_warmup
from slope_fx.sparse.weight import find_alive
from slope_fx.sparse.written import note_step

_replaced = WeakTensorKeyDictionary()
"""Replaced parameters, weakly held: the replacement, and the function that replaced it."""


def watch(replaced: Iterable[tuple[Tensor, Tensor]] = (), by: str = "slope_fx.compile") -> None:
    """Check all following optimizer steps in this process.

    Args:
        replaced: parameters that were replaced, each with its replacement. An optimizer that holds
            the first and not the second was made too early, and would not train the second.
        by: the function that replaced them.
    """
    for old, new in replaced:
        _replaced[old] = TensorWeakRef(new), by
    _register()


@functools.cache
def _register() -> None:
    register_optimizer_step_pre_hook(torch.compiler.disable(_begins))
    register_optimizer_step_post_hook(torch.compiler.disable(_ends))


def _begins(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    note_step()
    parameters = list(_parameters(optimizer))
    idle = find_alive(lambda weight: weight.rank is not None and not weight.adapter_active)
    asleep = {id(factor) for weight in idle for factor in (weight.lora_A, weight.lora_B)}
    for parameter in parameters:
        if id(parameter) in asleep:
            # An inactive adapter must not be updated, even if its gradient is zero instead of None.
            # zero_grad(set_to_none=False) sets zeros. So does torch.distributed.checkpoint to
            # initialize an optimizer's state. Its state is empty, so that it starts with fresh
            # moments. A load may have set one, and torch.distributed.checkpoint needs one for each
            # parameter.
            parameter.grad = None
            optimizer.state[parameter] = {}
    note_trained(optimizer.param_groups)
    held = {id(parameter) for parameter in parameters}
    for weight in find_alive(lambda weight: id(weight.values) in held):
        if weight.probe is not None:
            note_optimizer(optimizer, [weight.values])
    for weight in find_alive(lambda weight: weight.start is not None):
        if id(weight.values) in held:
            settle(weight)
    _tell_of_replaced(optimizer, parameters)
    if isinstance(optimizer, LBFGS) and any(isinstance(p, Mask) for p in parameters):
        raise ArgumentError(
            "LBFGS moves every parameter that it holds, and it holds masks. Give it those that "
            "train: LBFGS([p for p in model.parameters() if p.requires_grad])."
        )
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        _gradients_are_there(optimizer, first=True)
        return None
    calls = 0

    def run() -> Any:
        nonlocal calls
        calls += 1
        loss = closure()
        _gradients_are_there(optimizer, first=calls == 1)
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": run}
    return (args[0], run, *args[2:]), kwargs


def _gradients_are_there(optimizer: Optimizer, *, first: bool) -> None:
    """Before the update of a step, after its closure if it has one: Lightning's always has.

    Args:
        optimizer: the optimizer.
        first: whether the closure was called once. LBFGS calls it several times.
    """
    parameters = list(_parameters(optimizer))
    held = {id(parameter) for parameter in parameters}
    # A fused optimizer divides gradients by this itself, in the update.
    scale = getattr(optimizer, "grad_scale", None)
    for weight in find_alive(lambda weight: id(weight.values) in held):
        before_step(weight, 1.0 if scale is None else scale)
    _tell_of_missing_schedule(parameters)
    if first:
        begin_warmup(optimizer)


def _ends(optimizer: Optimizer, *_: object) -> None:
    end_warmup(optimizer)


def _tell_of_missing_schedule(parameters: list[Any]) -> None:
    """Warn once for each model that needs a Schedule and has none."""
    stepped = {id(p) for p in parameters if p.grad is not None}
    without = find_alive(
        lambda w: (
            not (w.phase.scheduled or w.phase.told)
            and (w.method.steps or (w.rank is not None and not w.adapter_active))
        )
    )
    trained = [weight for weight in without if id(weight.values) in stepped]
    for weight in trained:
        weight.phase.told = True
    if trained:
        first = trained[0]
        what, lost = "have adapters", "the adapters never take part"
        if first.method.steps:
            what, lost = f'train by method="{first.method.name}"', "their masks never change"
        warnings.warn(
            f"{len(trained)} layers ({first.name} and so on) {what}, but no slope_fx.Schedule was "
            f"made for their model, so {lost}. Make slope_fx.Schedule(model, total_steps=...) "
            "before training, and step it after the optimizer.",
            TrainingWarning,
            stacklevel=users_stacklevel(),
        )


def _tell_of_replaced(optimizer: Optimizer, parameters: list[Any]) -> None:
    """Warn once that an optimizer has dense weights that sparse weights have replaced."""
    held = {id(parameter) for parameter in parameters}
    stale = {}
    for parameter in parameters:
        new, by = _replaced.get(parameter, (None, ""))
        if new is not None and id(new()) not in held:
            stale[parameter] = by
    for parameter in stale:
        del _replaced[parameter]
    for by in sorted(set(stale.values())):
        warnings.warn(
            f"The {type(optimizer).__name__} was made before {by} and holds "
            f"{list(stale.values()).count(by)} parameters that it replaced. It does not train what "
            f"is in their place. Make the optimizer after {by}.",
            TrainingWarning,
            stacklevel=users_stacklevel(),
        )


def _parameters(optimizer: Optimizer) -> Iterable[Any]:
    return (p for group in optimizer.param_groups for p in group["params"])
