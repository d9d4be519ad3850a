"""Load a compiled model from a checkpoint."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from slope_fx.attach import attach, attach_frozen, make_record
from slope_fx.backend.settings import RunOptions, Settings
from slope_fx.checkpoints.configured import from_configuration
from slope_fx.checkpoints.filling import fill_model
from slope_fx.checkpoints.layers import (
    Reader,
    check_names,
    for_inference,
    read_frozen,
    read_parts,
)
from slope_fx.checkpoints.manifest import Manifest, check_files, read_manifest
from slope_fx.checkpoints.saving import named_tensors
from slope_fx.checkpoints.unstored import unstored_buffers
from slope_fx.checks import check_model, check_plain, say_without_effect
from slope_fx.errors import ArgumentError, CheckpointError, StateError, first_line
from slope_fx.frozen.install import put_weight
from slope_fx.frozen.weight import UNFROZEN
from slope_fx.methods import method_of
from slope_fx.planning.config import parse_dtype
from slope_fx.planning.plan import SparsePlan, sparse_plans
from slope_fx.record import RECORD, Frozen, Record, trainable_record_of
from slope_fx.sparse.fallback import OnFallback
from slope_fx.sparse.install import install, places_of, plain_modes, restore
from slope_fx.sparse.optimizers import watch
from slope_fx.sparse.parts import Parts


def load_pretrained(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    frozen: bool | None = None,
    verify: bool = True,
    **run: Unpack[RunOptions],
) -> nn.Module:
    """Returns the compiled model that :func:`slope_fx.save_pretrained` wrote.

    A transformers model is built from the checkpoint's ``config.json``. It is in evaluation mode,
    as after ``from_pretrained``: call ``.train()`` to train it. Adapters are active if they were
    active when the model was saved.

    To load a model that no rank could hold whole, make it without data, shard it, and load it::

        model = slope_fx.load_pretrained(path, device="meta")
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        slope_fx.load_pretrained(path, model)  # each rank reads its part

    A frozen model is loaded as :func:`slope_fx.freeze` makes it. Its tensors are views of the
    files, so the system reads them when they are used, and shares them between processes. What is
    cast or moved is copied, a layer at a time. Of a checkpoint of a model that trains, the backward
    masks, the training state and idle adapters are not read.

    Args:
        path: folder of the checkpoint.
        model: a new dense model, as before ``compile``. Required if the saved model is not a
            transformers model. Its weights are replaced and its mode is kept. Or a compiled
            model, sharded or not, with the same sparse layers: the values are loaded into its
            tensors, by all ranks together if it is sharded.
        device: device of the model; None for the CPU. "meta" makes the model without reading a
            tensor. A compiled model keeps its devices; only what is on the meta device moves.
        dtype: dtype of the floating-point tensors, such as "bfloat16" or ``torch.bfloat16``.
            None keeps the stored dtypes.
        frozen: whether the model is for inference, as after :func:`slope_fx.freeze`. None: as it
            was saved.
        verify: whether to check the hashes of the files before the tensors are read.
        run: fields of :class:`~slope_fx.backend.Settings`, as for :func:`slope_fx.compile`. The
            default of ``region`` is the stored region.

    Returns:
        The model.

    Raises:
        ArgumentError: an argument has a value that is not allowed.
        StateError: ``model`` is frozen; or ``frozen=False``, and the checkpoint is of a frozen
            model.
        CheckpointError: a file or a tensor is missing, unexpected, truncated or changed, has
            another pattern, shape or dtype, or has a newer format version. A given ``model`` is
            then unchanged.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    to = parse_dtype(dtype)
    try:
        device = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device={device!r}: {first_line(error)}") from None
    frozen = _whether_frozen(folder, manifest, frozen, model, device)
    if model is not None and isinstance(getattr(model, "__dict__", {}).get(RECORD), Record):
        _check_without_effect(dtype, run, device)
        check_names(folder, manifest)
        replaced = fill_model(model, folder, manifest, device, verify=verify)
        watch(replaced, by="slope_fx.load_pretrained")
        return model
    check_files(folder, manifest, hashes=verify and device.type != "meta")
    check_names(folder, manifest)
    if run.get("region") is None:
        run["region"] = manifest.region  # type: ignore[typeddict-item]
    settings = _settings(run)
    say_without_effect(settings)
    given = model is not None
    if model is None:
        model = from_configuration(folder, manifest)
    else:
        check_model(model)
        check_plain(model)
    if frozen:
        manifest = for_inference(manifest)
    with Reader(folder, manifest, device, to, mapped=frozen) as reader, ExitStack() as undo:
        _keep_parameters(model, undo)
        if frozen:
            replaced = _install_frozen(model, reader, settings.engine, undo)
        else:
            replaced = _install(model, reader, settings.on_fallback, undo)
        with plain_modes():
            replaced += _fill(model, manifest, reader)
        record = make_record(
            model, manifest.config, settings, manifest.plans, manifest.untraced_because,
            manifest.graphs,
        )  # fmt: skip
        if frozen:
            attach_frozen(model, record, manifest.inference or Frozen())
        else:
            attach(model, record, undo)
        for name, parameter in model.named_parameters():
            if frozen or name in manifest.frozen:
                parameter.requires_grad_(False)
        undo.pop_all()
    # A buffer that is not stored can't be made again, so it keeps its values.
    home = torch.device("cpu") if device.type == "meta" else device
    move_buffers(model, manifest, home, to)
    if not given:
        return model.eval()
    watch(replaced, by="slope_fx.load_pretrained")
    return model


def _check_without_effect(dtype: object, run: RunOptions, device: torch.device) -> None:
    given = [name for name, value in {"dtype": dtype, **run}.items() if value is not None]
    if given or device.type == "meta":
        raise ArgumentError(
            f"{given[0] if given else 'device=' + repr(str(device))} was given with a model that "
            "is compiled already, and keeps what it has. Leave it out."
        )


def _settings(run: RunOptions) -> Settings:
    known = RunOptions.__annotations__
    if unknown := [name for name in run if name not in known]:
        raise ArgumentError(f"there is no argument {unknown[0]!r}; there are {', '.join(known)}.")
    return Settings.of(**run)


def _whether_frozen(
    folder: Path,
    manifest: Manifest,
    frozen: bool | None,
    model: nn.Module | None,
    device: torch.device,
) -> bool:
    """Whether to load a frozen model."""
    if model is not None and isinstance(getattr(model, "__dict__", {}).get(RECORD), Record):
        trainable_record_of(model)
        if manifest.inference is not None:
            raise StateError(
                f"{folder} holds a frozen model, and model is a {type(model).__name__} that "
                f"trains. Load the checkpoint without a compiled model. {UNFROZEN}"
            )
        if frozen is not None:
            raise ArgumentError(
                f"frozen={frozen!r} was given with a model that is compiled already. Leave it out, "
                "and call slope_fx.freeze(model) after loading."
            )
        return False
    if frozen is False and manifest.inference is not None:
        raise StateError(f"frozen=False, and {folder} holds a frozen model. {UNFROZEN}")
    frozen = manifest.inference is not None or bool(frozen)
    if frozen and device.type == "meta":
        raise ArgumentError(
            'device="meta" can\'t hold a frozen model, which is not filled later. Give the device '
            "that it runs on."
        )
    return frozen


def _keep_parameters(model: nn.Module, undo: ExitStack) -> None:
    for module in model.modules():
        for kind in ("_parameters", "_buffers"):
            undo.callback(module.__dict__.__setitem__, kind, dict(getattr(module, kind)))


def _install(
    model: nn.Module, reader: Reader, on_fallback: OnFallback, undo: ExitStack
) -> list[tuple[Tensor, Tensor]]:
    """Install the compressed weights in the model."""
    plans = _fitting_plans(model, reader)

    def make_parts(plan: SparsePlan, dense: Tensor) -> Parts:
        return read_parts(plan, reader)

    method = method_of(reader.manifest.config.method)
    return install(model, plans, make_parts, method, on_fallback, undo)


def _install_frozen(
    model: nn.Module, reader: Reader, engines: str, undo: ExitStack
) -> list[tuple[Tensor, Tensor]]:
    """Install the frozen weights in the model."""
    plans, places = _fitting_plans(model, reader), places_of(model)
    replaced: list[tuple[Tensor, Tensor]] = []
    with plain_modes(), torch.no_grad():
        for plan in plans:
            dense = model.get_parameter(plan.parameter_name)
            for module, _ in places[id(dense)]:
                undo.callback(restore, module, type(module), dict(module.__dict__))
                module.__dict__["_parameters"] = dict(module._parameters)
                module.__dict__["_modules"] = dict(module._modules)
            weight = put_weight(plan, places[id(dense)], read_frozen(plan, reader), engines)
            replaced.append((dense, weight.values))
    return replaced


def _fitting_plans(model: nn.Module, reader: Reader) -> list[SparsePlan]:
    """The plans of the sparse layers, which fit the model.

    Raises:
        CheckpointError: a layer does not fit.
    """
    plans = sparse_plans(reader.manifest.plans)
    parameters = dict(model.named_parameters())
    for plan in plans:
        parameter = parameters.get(plan.parameter_name)
        if parameter is None or tuple(parameter.shape) != plan.layout.shape:
            got = "has none" if parameter is None else f"has shape {tuple(parameter.shape)}"
            raise CheckpointError(
                f"{reader.folder} holds {plan.parameter_name} of shape {plan.layout.shape}; the "
                f"model {got}. Make the model with the same configuration."
            )
    return plans


def move_buffers(
    model: nn.Module, manifest: Manifest, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Move the buffers that are not stored to the device, and restore their dtypes."""
    for name, buffer in unstored_buffers(model).items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        kind = None
        if dtype is None and buffer.is_floating_point():
            kind = getattr(torch, manifest.buffers.get(name, ""), None)
        owner._buffers[attribute] = buffer.to(device, kind or buffer.dtype)


def _fill(model: nn.Module, manifest: Manifest, reader: Reader) -> list[tuple[Tensor, Tensor]]:
    """Load all other parameters and buffers, and check that every stored tensor was read."""
    named, aliases = named_tensors(model)
    replaced: list[tuple[Tensor, Tensor]] = []
    _check_sharing(reader.folder, named, aliases, manifest)
    for name, tensor in named.items():
        stored = manifest.aliases.get(name, name)
        if stored in manifest.tensors and stored not in reader.unread:
            continue  # already installed
        value = reader.read(name, tuple(tensor.shape))
        if value.is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{reader.folder}: {name} is {value.dtype}, the model's {tensor.dtype}."
            )
        new = _assign(model, tensor, value)
        if tensor.requires_grad:
            replaced.append((tensor, new))
    if reader.unread:
        names = sorted(reader.unread)
        raise CheckpointError(
            f"{reader.folder} has {names[0]}"
            + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
            + ", for which the model has no place."
        )
    return replaced


def _check_sharing(
    folder: Path, named: Mapping[str, Tensor], aliases: Mapping[str, str], manifest: Manifest
) -> None:
    """Check that the model shares the same parameters as the saved model."""

    def groups(names: Mapping[str, Any], others: Mapping[str, str]) -> set[frozenset[str]]:
        found: dict[str, set[str]] = {name: {name} for name in names}
        for other, name in others.items():
            found.setdefault(name, {name}).add(other)
        return {frozenset(group) for group in found.values() if len(group) > 1}

    mine, theirs = groups(named, aliases), groups(manifest.tensors, manifest.aliases)
    if mine != theirs:
        different = sorted(sorted(group) for group in mine ^ theirs)[0]
        raise CheckpointError(
            f"{folder}: {' and '.join(different)} are shared in the "
            f"{'model' if frozenset(different) in mine else 'checkpoint'} and not in the other. "
            "Make the model with the same configuration."
        )


def _assign(model: nn.Module, old: Tensor, value: Tensor) -> Tensor:
    """Replace ``old`` by ``value`` in all modules."""
    new: Tensor = value
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(value, requires_grad=old.requires_grad)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is old:
                    tensors[name] = new  # type: ignore[assignment]
    return new
