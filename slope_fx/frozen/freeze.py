"""``freeze``: turns a compiled model into one for inference, in place."""

import dataclasses
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slope_fx.attach import attach, detach
from slope_fx.errors import UnsupportedError
from slope_fx.frozen.install import FrozenParts, Places, put_weight
from slope_fx.planning.config import parse_dtype
from slope_fx.planning.plan import SparsePlan, sparse_name
from slope_fx.planning.regions import Regions
from slope_fx.record import Frozen, Record, sparse_weights, trainable_record_of
from slope_fx.sparse.blank import check_filled
from slope_fx.sparse.install import plain_modes
from slope_fx.sparse.weight import SparseWeight

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model, *, dtype: str | torch.dtype | None = None) -> Model:
    """Turn a compiled model into one for inference, in place.

    The model keeps the values, the forward masks and the active adapters of its sparse weights. The
    backward masks, inactive adapters and gradients are dropped, and nothing requires gradients. At
    2:4, the weights take 0.5625 of the bytes of dense 16-bit weights. Each product measures its
    routes on this machine: where the sparse product is slower for a number of tokens, the weight
    is expanded, and the product is dense.

    The model can be saved with :func:`slope_fx.save_pretrained` and exported with
    ``torch.export``. It is compiled as one graph.

    Args:
        model: the object that ``compile`` or ``load_pretrained`` returned, on one process.
        dtype: dtype of the parameters, such as "bfloat16". None keeps their dtypes.

    Returns:
        ``model``.

    Raises:
        StateError: ``model`` is frozen, not the object that ``compile`` returned, or not
            initialized.
        ArgumentError: an argument has a value that is not allowed.
        UnsupportedError: the model is sharded, or on the meta device.
    """
    record = trainable_record_of(model)
    to = parse_dtype(dtype)
    weights = sparse_weights(model)
    for weight in weights.values():
        _check(weight)
    plans = {plan.name: plan for plan in record.plans if isinstance(plan, SparsePlan)}
    places = _places(model)
    detach(model)
    with torch.no_grad(), plain_modes():
        for name, weight in weights.items():
            put_weight(plans[name], places[weight], parts_of(weight, to), record.settings.engine)
            del weight
        weights.clear()
        _finish(model, to)
    attach_frozen(model, record, Frozen())
    return model


def attach_frozen(model: nn.Module, record: Record, frozen: Frozen) -> None:
    """Attach the record of a frozen model, and compile the model."""
    regions = record.regions if record.settings.region == "blocks" else Regions()
    with ExitStack() as undo:
        attach(model, dataclasses.replace(record, regions=regions, frozen=frozen), undo)
        undo.pop_all()


def _check(weight: SparseWeight) -> None:
    """Check that a weight can be frozen."""
    check_filled(weight)
    tensors = [weight.values, weight.forward_bits, weight.lora_A, weight.lora_B]
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        raise UnsupportedError(
            f"{weight.name} is sharded. Save the model with slope_fx.save_pretrained, and load it "
            "on one process with load_pretrained(path, frozen=True)."
        )
    if weight.values.is_meta:
        raise UnsupportedError(f"{weight.name} is on the meta device, without values to freeze.")
    if problem := weight.masks_problem():
        raise UnsupportedError(f"{weight.name} should be {weight.pattern}, but {problem}.")


def _places(model: nn.Module) -> dict[SparseWeight, Places]:
    places: dict[SparseWeight, Places] = {}
    for module in model.modules():
        for attribute in getattr(getattr(type(module), "_slope_kind", None), "attributes", ()):
            weight = module._modules[sparse_name(attribute)]
            assert isinstance(weight, SparseWeight)
            places.setdefault(weight, []).append((module, attribute))
    return places


def parts_of(weight: SparseWeight, dtype: torch.dtype | None) -> FrozenParts:
    """The tensors of a sparse weight for inference."""
    bits = weight.forward_bits.detach()
    values = weight.storage.values(weight.values.detach(), bits, weight.pattern)
    adapter = None
    if weight.adapter_active:
        adapter = folded(weight.lora_A, weight.lora_B, weight.scale, dtype)
    return FrozenParts(values.to(dtype or values.dtype), bits.as_subclass(Tensor), adapter)


def folded(
    a: Tensor | None, b: Tensor | None, scale: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """A and ``scale * B``. The scale is applied before a cast."""
    assert a is not None
    assert b is not None
    a, b = a.detach(), b.detach()
    return a.to(dtype or a.dtype, copy=True), (b * scale).to(dtype or b.dtype)


def _finish(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Drop the gradients, and cast the parameters and the stored buffers."""
    for parameter in model.parameters():
        parameter.grad = None
        if parameter.requires_grad:
            parameter.requires_grad_(False)
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    if dtype is None:
        return
    stored = model.state_dict(keep_vars=True)
    for module_path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            path = f"{module_path}.{name}" if module_path else name
            if buffer is not None and buffer.is_floating_point() and path in stored:
                module._buffers[name] = buffer.to(dtype)
