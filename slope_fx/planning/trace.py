"""Trace a model with fake tensors to find the roles of its parameters."""

import copy
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slope_fx.errors import ArgumentError, first_line
from slope_fx.hub import takes_cache
from slope_fx.passes import WeightRole, graph_kinds, weight_roles
from slope_fx.passes.views import Read

log = logging.getLogger(__name__)

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any] | None


@dataclass(frozen=True)
class Trace:
    """The result of tracing a model.

    Attributes:
        roles: parameter name (the first name of a shared parameter) -> role.
        untraced_because: the reason why the model was not traced; "" if it was traced. The roles
            of an untraced model are derived from the types of its modules.
        graphs: module path -> number of its graph. Modules with equal graphs have equal numbers.
    """

    roles: dict[str, WeightRole]
    untraced_because: str = ""
    graphs: dict[str, int] = field(default_factory=dict)


def trace(model: nn.Module, example_inputs: ExampleInputs) -> Trace:
    """Trace ``model`` with ``torch.export`` and fake tensors, in its current mode.

    The model and the random state do not change.

    Args:
        model: the model.
        example_inputs: a tensor, a sequence of arguments, a mapping of keyword arguments, or the
            pair (arguments, keyword arguments). None: generated inputs for a transformers model;
            other models are not traced.

    Raises:
        ArgumentError: the inputs do not fit the model's forward.
    """
    given = example_inputs is not None
    inputs = split_inputs(example_inputs) if given else transformers_inputs(model)
    if inputs is None:
        return Trace(_roles_by_type(model), "no example_inputs were given")
    args, kwargs = inputs
    if any(parameter.is_meta for parameter in model.parameters()):
        # Fake tensors of one operation must have one device.
        args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, inputs)
    if takes_cache(model):
        # The outputs would include keys and values, and their projections would look like heads.
        kwargs.setdefault("use_cache", False)
    _check_signature(model, args, kwargs)
    try:
        exported = _exported(model, args, kwargs)
    except Exception as error:
        log.info("torch.export failed", exc_info=True)
        if given:
            _check_inputs_run(model, args, kwargs)
        reason = f"torch.export failed: {type(error).__name__}: {first_line(error)}".rstrip(".")
        try:  # some transformers models need an attention mask, and others fail with one
            masked = None if given else _masked(model, kwargs)
            if masked is None:
                return Trace(_roles_by_type(model), reason)
            exported = _exported(model, args, masked)
        except Exception:
            log.info("torch.export failed with a mask too", exc_info=True)
            return Trace(_roles_by_type(model), reason)
    signature = exported.graph_signature
    first = first_names(model)
    parameters = {
        placeholder: first[id(model.get_parameter(name))]
        for placeholder, name in signature.inputs_to_parameters.items()
    }
    user_inputs = [name for name in signature.user_inputs if isinstance(name, str)]
    gm = exported.graph_module
    return Trace(weight_roles(gm, parameters, user_inputs), graphs=graph_kinds(gm))


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # With gradients enabled, because torch's modules have other code paths without gradients.
    quiet = _quiet_fake_tensors()
    with quiet, _random_state_kept(), _attributes_kept(model), torch.enable_grad():
        return torch.export.export(model, args, kwargs, strict=False)


def _masked(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The inputs with an attention mask; None if the model does not accept one."""
    ids, accepted = kwargs.get("input_ids"), inspect.signature(model.forward).parameters
    if ids is None or "attention_mask" not in accepted:
        return None
    return {**kwargs, "attention_mask": torch.ones_like(ids)}


def first_names(model: nn.Module) -> dict[int, str]:
    """The first qualified name of each parameter, by the id of the parameter."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of type ``nn.Linear`` and transformers' ``Conv1D``, by qualified name."""
    types = linear_classes()
    return {name: module for name, module in model.named_modules() if isinstance(module, types)}


def linear_classes() -> tuple[type[nn.Module], ...]:
    """``nn.Linear`` and transformers' ``Conv1D``."""
    # No import: a model has a Conv1D only if transformers is already imported.
    utilities = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear,) if utilities is None else (nn.Linear, utilities.Conv1D)


def split_inputs(
    given: ExampleInputs, argument: str = "example_inputs"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and keyword arguments of example inputs.

    Args:
        given: the inputs, in one of the forms of :func:`trace`.
        argument: name of the argument, for error messages.

    Raises:
        ArgumentError: ``given`` has none of the allowed forms.
    """
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) == 2 and isinstance(given[0], tuple) and isinstance(given[1], Mapping):
            return given[0], dict(given[1])
        return tuple(given), {}
    raise ArgumentError(
        f"{argument} is a {type(given).__name__}; allowed are a tensor, a sequence of "
        "arguments, a mapping of keyword arguments, or the pair (arguments, keyword arguments)."
    )


def _check_signature(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(
            f"example_inputs don't fit {type(model).__name__}.forward{signature}: {error}. "
            "Pass what you would call the model with."
        ) from None


def _check_inputs_run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the forward after a failed trace, to check whether the inputs are the cause.

    It runs on a copy of the model, because a forward may change the state of the model.

    Raises:
        ArgumentError: the forward fails on the inputs.
    """
    try:
        clone = copy.deepcopy(model)
    except Exception:
        log.info("the model can't be copied, so example_inputs weren't tried", exc_info=True)
        return
    try:
        with torch.no_grad(), _random_state_kept():
            clone(*args, **kwargs)
    except Exception as error:
        raise ArgumentError(
            f"example_inputs don't fit: {type(model).__name__} fails on them with "
            f"{type(error).__name__}: {first_line(error)} Pass what you would call the model "
            "with, on the model's device."
        ) from error


def _random_state_kept() -> AbstractContextManager[None]:
    """Restores the random state, which a dropout in the trace changes."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Restores the attributes that a traced forward sets on its modules to fake tensors."""
    before = {
        module: {k: dict(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()}
        for module in model.modules()
    }
    try:
        yield
    finally:
        for module, attributes in before.items():
            kept = {}
            for name, value in attributes.items():
                now = module.__dict__.get(name)
                if isinstance(now, dict) and isinstance(value, dict):
                    # The dict is restored in place, because other objects may refer to it.
                    if [(k, id(v)) for k, v in now.items()] != [
                        (k, id(v)) for k, v in value.items()
                    ]:
                        now.clear()
                        now.update(value)
                    value = now
                kept[name] = value
            module.__dict__.clear()
            module.__dict__.update(kept)


@contextmanager
def _quiet_fake_tensors() -> Iterator[None]:
    """Silences the log of torch's fake tensors. slope_fx reports a failed trace itself."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def transformers_inputs(
    model: nn.Module, rows: int = 1
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Inputs for a transformers model: short sequences or images. None for other models."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        return None
    device = next(iter(model.parameters())).device
    accepted = inspect.signature(model.forward).parameters
    ids = torch.ones((rows, 8), dtype=torch.long, device=device)
    if main == "input_ids":
        kwargs: dict[str, Any] = {"input_ids": ids}
    elif main == "pixel_values":
        size = getattr(config, "image_size", None)
        if size is None:
            return None
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        channels = getattr(config, "num_channels", 3)
        dtype = next(iter(model.parameters())).dtype
        images = torch.zeros(rows, channels, height, width, dtype=dtype)
        kwargs = {"pixel_values": images.to(device)}
    else:
        return None
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        kwargs["decoder_input_ids"] = ids
    return (), kwargs


def _roles_by_type(model: nn.Module) -> dict[str, WeightRole]:
    """Roles for an untraced model: linears by module type.

    The first linear is assumed to read the input, and the last to make the output.
    """
    first = first_names(model)
    linears = linear_modules(model)
    roles: dict[str, WeightRole] = {}
    for path, module in linears.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            role = roles.setdefault(first[id(weight)], WeightRole())
            role.scopes.append(path)
            role.reads.add(_whole(weight, transposed=not isinstance(module, nn.Linear)))
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and path not in linears and first[id(parameter)] in roles:
                roles[first[id(parameter)]].other_uses.append(f"{type(module).__name__}.{name}")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = list(roles)
    if names:
        roles[names[0]].reads_input = True
        head_weight = getattr(head, "weight", None)
        roles[first.get(id(head_weight), names[-1])].makes_output = True
    return roles


def _whole(weight: Tensor, *, transposed: bool) -> Read:
    """The read of the complete weight of a linear module."""
    d_in, d_out = weight.shape if transposed else reversed(weight.shape)
    return Read(transposed, d_in, d_out, 0, d_out, 1)
