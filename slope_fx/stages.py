"""Checks of a model that runs as a stage of a pipeline."""

import warnings
import weakref

import torch.distributed as dist
from torch import nn

from slope_fx.backend.noting import first_runs
from slope_fx.errors import ArgumentWarning, users_stacklevel
from slope_fx.planning.plan import DensePlan
from slope_fx.record import compiled_models, record_of, sparse_weights_in
from slope_fx.sparse.pipelines import running_stage

_checked: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def watch_stages() -> None:
    """Check all models of this process when they first run as a stage of a pipeline."""
    if _check_roles not in first_runs:
        first_runs.append(_check_roles)


def _check_roles() -> None:
    """Warn if the running stage was compiled alone, with the roles of a whole model.

    The Schedule of the stage then knows that it is one.
    """
    stage = running_stage()
    if stage is None:
        return
    for weight in sparse_weights_in(stage.submod).values():
        weight.phase.pipeline = stage.group or dist.group.WORLD
    for model in compiled_models(stage.submod):
        if model in _checked:
            continue
        _checked.add(model)
        wrong = []
        if not stage.is_first:
            wrong += _kept_dense(model, "skip_first")
        if not stage.is_last:
            wrong += _kept_dense(model, "skip_head")
        if wrong and _compiled_alone(model):
            warnings.warn(
                f"Stage {stage.stage_index} of {stage.num_stages} was compiled alone, as if it "
                f"were a whole model: {', '.join(wrong)}. Compile each stage with "
                "skip_first=stage_index == 0 and skip_head=stage_index == num_stages - 1, so "
                "that it has the sparse layers that it has as a part of the model.",
                ArgumentWarning,
                stacklevel=users_stacklevel(),
            )


def _kept_dense(model: nn.Module, option: str) -> list[str]:
    """The layers that ``option`` keeps dense, with the reason."""
    return [
        f"{plan.name} stays dense, {plan.reason}"
        for plan in record_of(model).plans
        if isinstance(plan, DensePlan) and plan.reason.endswith(f"({option})")
    ]


def _compiled_alone(model: nn.Module) -> bool:
    """Whether the model has all its layers. A part of a compiled model lacks some."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = sparse_weights_in(model)
    return all(
        plan.name in weights or not plan.parameter_name or plan.parameter_name in parameters
        for plan in record_of(model).plans
    )
