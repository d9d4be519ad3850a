"""Checks of the arguments of ``compile``."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from slope_fx.backend.settings import RunOptions, Settings
from slope_fx.errors import (
    ArgumentError,
    ArgumentWarning,
    StateError,
    UnsupportedError,
    users_stacklevel,
)
from slope_fx.methods import Dense, method_of
from slope_fx.planning.config import ConfigOptions, SlopeConfig, Sparsity
from slope_fx.planning.patterns import PatternRules
from slope_fx.planning.plan import SparsePlan
from slope_fx.record import sparse_weights_in
from slope_fx.sparse.sharded_first import members


class CompileOptions(ConfigOptions, RunOptions, total=False):
    """The keyword arguments of :func:`compile`: the fields of SlopeConfig and of Settings."""


def split_options(
    sparsity: Sparsity | SlopeConfig, options: Mapping[str, Any]
) -> tuple[SlopeConfig, Settings]:
    """Returns the configuration and the settings from the arguments of ``compile``.

    Raises:
        ArgumentError: an argument is unknown, or a value is not allowed.
    """
    known = (*ConfigOptions.__annotations__, *RunOptions.__annotations__)
    if unknown := [name for name in options if name not in known]:
        raise ArgumentError(f"there is no argument {unknown[0]!r}; there are {', '.join(known)}.")
    of_config = {name: options[name] for name in ConfigOptions.__annotations__ if name in options}
    of_run = {name: options[name] for name in RunOptions.__annotations__ if name in options}
    config = SlopeConfig.of(sparsity, cast(ConfigOptions, of_config))
    return config, Settings.of(**cast(RunOptions, of_run))


def check_model(model: nn.Module) -> None:
    """Check that ``model`` can be compiled, and is not already compiled or wrapped.

    Raises:
        StateError: the model is already compiled by slope_fx.
        ArgumentError: the model cannot be compiled in its current state.
        UnsupportedError: transformers split the model between ranks.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; it must be a torch.nn.Module.")
    if any(c.__name__ == "LightningModule" for c in type(model).__mro__):
        raise ArgumentError(
            "model is a LightningModule: Lightning calls its training_step, not its compiled "
            "forward. Compile the model in it: self.model = slope_fx.compile(self.model, ...)."
        )
    already = list(sparse_weights_in(model))
    if already:
        raise StateError(
            f"model is compiled already: {already[0]} holds a sparse weight, and {len(already)} "
            "layers in all. Compile a fresh dense model, or keep using this one."
        )
    _check_split(model)
    # Without Dynamo, whose import takes seconds, there is no such module.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    optimized = () if dynamo is None else dynamo.OptimizedModule
    for name, module in model.named_modules():
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            raise ArgumentError(
                f"model is wrapped in {type(module).__name__}, which goes on synchronising the "
                "parameters that compile replaces. Call slope_fx.compile first, then wrap."
            )
        if isinstance(module, optimized) or module._compiled_call_impl is not None:
            raise ArgumentError(
                f"{name or 'model'} is compiled by torch.compile already, with a backend that "
                "does not support sparse weights. Pass the uncompiled model: slope_fx.compile "
                "compiles it, and backend= and region= say how."
            )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ArgumentError(
                f"{name} is not initialised yet. Run a lazy module once before compile."
            )


def check_sharded(model: nn.Module, config: SlopeConfig) -> None:
    """Check that a model that fully_shard sharded before ``compile``, if any, can be compiled.

    Raises:
        UnsupportedError: something else splits a parameter too.
        ArgumentError: the masks or the adapters need calibration.
    """
    sharded = members(model)
    if sharded and config.needs_calibration:
        raise ArgumentError(
            f"{config.needs_calibration} needs a model that is not sharded, and fully_shard "
            "sharded this one. Call slope_fx.compile first, then fully_shard."
        )
    for name, parameter in model.named_parameters() if sharded else ():
        member = sharded.get(id(parameter))
        if isinstance(parameter, DTensor) and (member is None or member.param.is_dtensor):
            raise UnsupportedError(
                f"{name} is a DTensor on {parameter.device_mesh}, which not only a fully_shard of "
                "a module in the model made. Call slope_fx.compile first, then "
                "parallelize_module, then fully_shard."
            )


def check_plain(model: nn.Module) -> None:
    """Check that a dense model, whose tensors are to be replaced, is not sharded.

    Raises:
        ArgumentError: it is.
    """
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            raise ArgumentError(
                f"{name or 'model'} is sharded by fully_shard already. Load into a compiled "
                'model: make it with slope_fx.load_pretrained(path, device="meta"), call '
                "fully_shard, and then slope_fx.load_pretrained(path, model)."
            )


def check_meta(model: nn.Module, plans: Sequence[SparsePlan], config: SlopeConfig) -> None:
    """Check that weights on the meta device, if any, can get their masks and adapters later.

    Args:
        model: the model.
        plans: plans of its sparse weights.
        config: the configuration.

    Raises:
        ArgumentError: the masks or the adapters need the weights now.
    """
    names = [plan.parameter_name for plan in plans]
    on_meta = [name for name in names if model.get_parameter(name).is_meta]
    if not on_meta:
        return
    what = config.needs_calibration
    if callable(config.mask):
        what = "mask=, a function,"
    elif config.adapter_init != "zero":
        what = f"adapter_init={config.adapter_init!r}"
        if callable(config.adapter_init):
            what = "adapter_init=, a function,"
    if what:
        raise ArgumentError(
            f"{what} needs the weights, and {on_meta[0]} is on the meta device. Use "
            'mask="magnitude" or "random" and adapter_init="zero", or load the weights before '
            "compile."
        )


def _check_split(model: nn.Module) -> None:
    """Check that transformers did not split the model, for any parallelism.

    Raises:
        UnsupportedError: it did.
    """
    experts = [n for n, m in model.named_modules() if getattr(m, "_is_expert_parallel", False)]
    if experts:
        raise UnsupportedError(
            f"{', '.join(experts)}: transformers split the experts between ranks (ep_size), and "
            "slope_fx has no expert parallelism. Load the model without ep_size, compile it, and "
            "shard it with torch.distributed.fsdp.fully_shard, which shards sparse experts too."
        )
    for name, module in model.named_modules():
        split = [p for p in module.parameters(recurse=False) if isinstance(p, DTensor)]
        if split and getattr(module, "_is_hooked", False):
            raise UnsupportedError(
                f"{name}: transformers split it between {split[0].device_mesh.size()} ranks "
                "(tp_plan) and gave it a forward of its own. Load the model without tp_plan, "
                "compile it, then split it by the same plan: "
                "slope_fx.integrations.tensor_parallel.parallelize(model, mesh)."
            )
    if hasattr(model, "_pp_stage"):
        raise UnsupportedError(
            "model: transformers split its layers between ranks (pp_size), for generation only: "
            "no gradient passes between its stages. Load the model without pp_size, compile it, "
            "and make the stages with torch.distributed.pipelining."
        )


def say_without_effect(settings: Settings) -> None:
    """Warn about settings that have no effect without a backend."""
    for what in settings.without_effect():
        warnings.warn(
            f"{what} has no effect with backend=None; give it to rewriting_backend or to "
            "torch.compile.",
            ArgumentWarning,
            stacklevel=users_stacklevel(),
        )


def say_what_was_ignored(
    settings: Settings, config: SlopeConfig, rules: PatternRules, unused_calibration: bool
) -> None:
    """Warn about arguments, or parts of arguments, that have no effect."""
    say_without_effect(settings)
    lines = [
        f"sparsity[{key!r}] matches no linear of the model that an earlier key doesn't match; see "
        "slope_fx.explain(model) for the names."
        for key in rules.unmatched()
    ]
    lines += _without_effect_in(config)
    if unused_calibration:
        lines.append('calibration has no effect: only mask="wanda" and adapter_init="eora" use it.')
    for line in lines:
        warnings.warn(line, ArgumentWarning, stacklevel=3)


def _without_effect_in(config: SlopeConfig) -> list[str]:
    """The fields of a configuration that its method does not use."""
    method, default = method_of(config.method), SlopeConfig()
    lines = []
    if isinstance(method, Dense):
        for name in ("mask", "adapter_rank"):
            given = getattr(config, name)
            if given != getattr(default, name):
                lines.append(f'{name}={given!r} has no effect: method="dense" prunes nothing.')
    elif not method.compressed and config.mask != default.mask:
        lines.append(
            f'mask={config.mask!r} chooses the first mask alone: method="{method.name}" chooses by '
            "magnitude after each step."
        )
    return lines


def say_untraced(because: str, *, given: bool) -> None:
    """Warn if the model was not traced.

    Args:
        because: the reason; "" for a traced model.
        given: whether example inputs were given.
    """
    if not because:
        return
    advice = "Pass example_inputs that the model's forward accepts, so that it can be traced."
    if given:
        advice = (
            "Its forward runs on the example_inputs, but torch.export can't follow it: see "
            'TORCH_LOGS="+slope_fx" for where.'
        )
    warnings.warn(
        f"The model was not traced ({because}). Its linears are its nn.Linear and Conv1D modules: "
        "the first is assumed to read the input, and the last to be the output head. "
        f"{advice}",
        ArgumentWarning,
        stacklevel=3,
    )
