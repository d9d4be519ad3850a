"""``freeze``: turns a compiled model into one for inference, in place."""

import dataclasses
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slope_fx.attach import attach_frozen, detach
from slope_fx.densify import densify
from slope_fx.errors import ArgumentError, UnsupportedError
from slope_fx.frozen.install import (
    FrozenParts,
    folded,
    form_of_parts,
    put_weight,
    sparse_places,
)
from slope_fx.frozen.weight import Kept
from slope_fx.kernels import quantised
from slope_fx.ops import expand
from slope_fx.planning.activations import Activations
from slope_fx.planning.adapters import low_rank
from slope_fx.planning.calibration import Calibration, observe
from slope_fx.planning.config import AdapterRank, check_choice, parse_dtype
from slope_fx.planning.plan import SparsePlan, layer_rank
from slope_fx.progress import progress
from slope_fx.record import Frozen, sparse_weights, trainable_record_of
from slope_fx.sparse.blank import check_filled
from slope_fx.sparse.install import plain_modes
from slope_fx.sparse.weight import SparseWeight

Model = TypeVar("Model", bound=nn.Module)
Values = Literal["float", "int8", "int4"]


def freeze(
    model: Model,
    *,
    dtype: str | torch.dtype | None = None,
    values: Values = "float",
    group: int | None = None,
    adapter_rank: AdapterRank = None,
    calibration: Calibration = None,
) -> Model:
    """Turn a compiled model into one for inference, in place.

    The model keeps the values, the forward masks and the active adapters of its sparse weights. The
    backward masks, inactive adapters and gradients are dropped, and nothing requires gradients. At
    2:4, the weights take 0.5625 of the bytes of dense 16-bit weights, 0.32 with int8 values and
    0.2 with int4 values. Each product measures its routes on this machine: where the sparse product
    is slower for a number of tokens, the weight is expanded, and the product is dense.

    With quantised values, new adapters replace the old ones. Their product B A is the best
    approximation of W + B A before, minus the quantised W (EoRA, arXiv 2410.21271).

    The model can be saved with :func:`slope_fx.save_pretrained` and exported with
    ``torch.export``. It is compiled as one graph.

    Args:
        model: the object that ``compile`` or ``load_pretrained`` returned, on one process.
        dtype: dtype of the parameters, such as "bfloat16". None keeps their dtypes.
        values: "float" keeps the values in the dtype of the model. "int8" and "int4" quantise them:
            symmetric, with a bf16 scale for each group of kept values in a row. Adapters and all
            other parameters stay as they are.
        group: number of values that share a scale: 32, 64 or 128. None: 64 for int8, 32 for int4.
        adapter_rank: with quantised values, the rank of the adapters, as for ``compile``. None: the
            rank of the active adapters, or no adapters.
        calibration: with quantised values, batches of inputs as for ``compile``. The adapters then
            minimize the error of the outputs of each layer on them, not that of the weights. A
            dense copy of the model runs on them.

    Returns:
        ``model``.

    Raises:
        StateError: ``model`` is frozen, not the object that ``compile`` returned, or not
            initialized; or its pruned part still takes part, as ``method="gradual"`` lets it.
        ArgumentError: an argument has a value that is not allowed.
        UnsupportedError: the model is sharded or on the meta device, or a weight has NaN or
            infinity, which has no code.
    """
    record = trainable_record_of(model)
    to = parse_dtype(dtype)
    frozen = _described(values, group, adapter_rank, calibration)
    weights = sparse_weights(model)
    for weight in weights.values():
        _check(weight, frozen)
    plans = {plan.name: plan for plan in record.plans if isinstance(plan, SparsePlan)}
    ranks = {n: weight.rank if weight.adapter_active else None for n, weight in weights.items()}
    if adapter_rank is not None:
        config = dataclasses.replace(record.config, adapter_rank=adapter_rank)
        ranks = {name: layer_rank(config, plans[name]) for name in weights}
    grams: dict[str, Activations] = {}
    if calibration is not None:
        chosen = [plans[name] for name in weights]
        grams = observe(densify(model), chosen, calibration, grams=True)
    places, engines = sparse_places(model), record.settings.engine
    adapters: dict[str, tuple[Tensor, Tensor] | None] = {}
    with torch.no_grad(), plain_modes():
        # What takes long, and may fail or be interrupted, comes before the model changes.
        for name, weight in progress(list(weights.items()), "freeze", "layer"):
            parts = parts_of(weight, to)
            if frozen.group:
                parts = quantised_parts(weight, parts, frozen, ranks[name], grams.pop(name, None))
                adapters[name] = parts.adapter
            form_of_parts(plans[name], parts, engines)
        detach(model)
        for name in list(weights):
            weight = weights.pop(name)
            parts = parts_of(weight, to)
            if frozen.group:
                parts = dataclasses.replace(coded(weight, parts, frozen), adapter=adapters[name])
            put_weight(plans[name], places.pop(weight), parts, engines)
        del weight
        _finish(model, to)
    attach_frozen(model, record, frozen)
    return model


def _described(
    values: Values, group: int | None, adapter_rank: AdapterRank, calibration: Calibration
) -> Frozen:
    """Check the arguments of ``freeze``."""
    check_choice("values", values, get_args(Values))
    if values != "float":
        group = quantised.DEFAULT_GROUP[values] if group is None else group
        check_choice("group", group, quantised.GROUPS)
        return Frozen(values, group)
    given = {"group": group, "adapter_rank": adapter_rank, "calibration": calibration}
    for name, argument in given.items():
        if argument is not None:
            raise ArgumentError(
                f'{name} was given with values="float", where it has no effect: values keep their '
                'dtype and adapters their content. Leave it out, or pass values="int8" or "int4".'
            )
    return Frozen()


def _check(weight: SparseWeight, frozen: Frozen) -> None:
    """Check that a weight can be frozen."""
    check_filled(weight)
    weight.check_faded()
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
    factors = (weight.lora_A, weight.lora_B) if weight.adapter_active else ()
    for what, tensor in (("it", weight.values), *(("its adapter", factor) for factor in factors)):
        if frozen.group and tensor is not None and not tensor.isfinite().all():
            raise UnsupportedError(
                f"{weight.name} can't be quantised: {what} has NaN or infinity, which has no code "
                f"in {frozen.values}."
            )


def parts_of(weight: SparseWeight, dtype: torch.dtype | None) -> FrozenParts:
    """The tensors of a sparse weight for inference."""
    bits = weight.forward_bits.detach()
    values = weight.kept_values()
    adapter = None
    if weight.adapter_active:
        adapter = folded(weight.lora_A, weight.lora_B, weight.scale, dtype)
    values = values.to(dtype or values.dtype)
    return FrozenParts(values, bits.as_subclass(Tensor), values.dtype, adapter)


def quantised_parts(
    weight: SparseWeight,
    parts: FrozenParts,
    frozen: Frozen,
    rank: int | None,
    activations: Activations | None,
) -> FrozenParts:
    """The parts with quantised values, and an adapter that makes up for the error.

    Args:
        weight: the sparse weight.
        parts: its parts for inference.
        frozen: the format of the values.
        rank: rank of the adapter, or None.
        activations: the calibration sums of the layer, or None.
    """
    parts = coded(weight, parts, frozen)
    if rank is None:
        return parts
    values, (codes, scales) = weight.kept_values(), (parts.values, parts.scales)
    assert scales is not None
    kept = values.shape[1]
    away = values.float() - quantised.dequantise(codes, scales, frozen.values, frozen.group, kept)
    dense = expand(away, weight.forward_bits, weight.forward_bits, weight.n, weight.m)
    error = dense.view(weight.stack, weight.d_out, weight.d_in)
    if weight.adapter_active and weight.lora_A is not None and weight.lora_B is not None:
        a = weight.lora_A.view(weight.stack, -1, weight.d_in).float()
        b = weight.lora_B.view(weight.stack, weight.d_out, -1).float()
        error = error + weight.scale * (b @ a)
    grams = [None] * weight.stack if activations is None else activations.gram
    assert grams is not None
    factors = [low_rank(error[i], rank, grams[i]) for i in range(weight.stack)]
    a, b = (torch.cat(part).to(parts.dtype) for part in zip(*factors, strict=True))
    return dataclasses.replace(parts, adapter=(a, b))


def coded(weight: SparseWeight, parts: FrozenParts, frozen: Frozen) -> FrozenParts:
    """The parts with codes and scales in the place of the values, and without an adapter."""
    codes, scales = quantised.quantise(weight.kept_values(), frozen.values, frozen.group)
    return dataclasses.replace(parts, values=codes, scales=scales, group=frozen.group, adapter=None)


def _finish(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Drop the gradients, and cast the parameters and the stored buffers."""
    for parameter in model.parameters():
        parameter.grad = None
        if parameter.requires_grad:
            parameter.requires_grad_(False)
        if dtype is not None and parameter.is_floating_point() and type(parameter) is not Kept:
            parameter.data = parameter.data.to(dtype)
    if dtype is None:
        return
    stored = model.state_dict(keep_vars=True)
    for module_path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            path = f"{module_path}.{name}" if module_path else name
            if buffer is not None and buffer.is_floating_point() and path in stored:
                module._buffers[name] = buffer.to(dtype)
