"""Load a compiled model from a checkpoint."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from typing_extensions import Unpack

from slope_fx.attach import attach, make_record
from slope_fx.backend.settings import RunOptions, Settings
from slope_fx.checkpoints.configured import from_configuration
from slope_fx.checkpoints.filling import fill_model
from slope_fx.checkpoints.manifest import (
    Manifest,
    check_files,
    read_manifest,
    tensor_names,
)
from slope_fx.checkpoints.saving import named_tensors, unstored_buffers
from slope_fx.checkpoints.tensors import Described
from slope_fx.checks import check_model, check_plain, say_without_effect
from slope_fx.errors import ArgumentError, CheckpointError, first_line
from slope_fx.kernels.packing import packed_width
from slope_fx.planning.adapters import Adapter
from slope_fx.planning.config import parse_dtype
from slope_fx.planning.masks import packed_masks_problem
from slope_fx.planning.plan import SparsePlan, sparse_name, sparse_plans, values_name
from slope_fx.record import RECORD, Record
from slope_fx.sparse.blank import Start
from slope_fx.sparse.fallback import OnFallback
from slope_fx.sparse.install import install, plain_modes
from slope_fx.sparse.optimizers import watch
from slope_fx.sparse.parts import Parts
from slope_fx.sparse.storage import storage_named


def load_pretrained(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
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
        verify: whether to check the hashes of the files before the tensors are read.
        run: fields of :class:`~slope_fx.backend.Settings`, as for :func:`slope_fx.compile`. The
            default of ``region`` is the stored region.

    Returns:
        The model.

    Raises:
        ArgumentError: an argument has a value that is not allowed.
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
    with _Reader(folder, manifest, device, to) as reader, ExitStack() as undo:
        _keep_parameters(model, undo)
        replaced = _install(model, manifest, reader, settings.on_fallback, undo)
        with plain_modes():
            replaced += _fill(model, manifest, reader)
        record = make_record(
            model, manifest.config, settings, manifest.plans, manifest.untraced_because,
            manifest.graphs,
        )  # fmt: skip
        attach(model, record, undo)
        for name in manifest.frozen:
            model.get_parameter(name).requires_grad_(False)
        undo.pop_all()
    # A buffer that is not stored can't be made again, so it keeps its values.
    home = torch.device("cpu") if device.type == "meta" else device
    _move_buffers(model, manifest, home, to)
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


class _Reader:
    """Reads the tensors of a checkpoint by name."""

    def __init__(
        self, folder: Path, manifest: Manifest, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.device, self.dtype = device, dtype
        self.unread = set(manifest.tensors)
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def read(self, name: str, shape: tuple[int, ...], kind: torch.dtype | None = None) -> Tensor:
        """The tensor ``name``, on the device and in the dtype of the reader.

        Args:
            name: name of the tensor, or an alias of it.
            shape: the expected shape.
            kind: the expected stored dtype. None: any dtype.

        Raises:
            CheckpointError: the tensor is missing, or has another shape or dtype.
        """
        name = self.manifest.aliases.get(name, name)
        file = self.manifest.tensors.get(name)
        if file is None:
            raise CheckpointError(f"{self.folder} has no tensor {name}, which the model needs.")
        if file not in self._open:
            opened = safe_open(str(self.folder / file), "pt", device="cpu")
            self._open[file] = self._stack.enter_context(opened)
        tensor: Tensor
        if self.device.type == "meta":
            part = self._open[file].get_slice(name)
            tensor = Described(tuple(part.get_shape()), part.get_dtype()).empty()
        else:
            tensor = self._open[file].get_tensor(name)
        if tuple(tensor.shape) != shape or (kind is not None and tensor.dtype != kind):
            want = f"{kind} {shape}" if kind is not None else f"{shape}"
            raise CheckpointError(
                f"{self.folder}: {name} is {tensor.dtype} {tuple(tensor.shape)}, where the model "
                f"needs {want}."
            )
        self.unread.discard(name)
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype or tensor.dtype)
        # A copy, because the tensor of safetensors may be a view of the file.
        return tensor.to(self.device, copy=True)


def check_names(folder: Path, manifest: Manifest) -> None:
    """Check that the files contain exactly the tensors that the manifest lists.

    Raises:
        CheckpointError: a tensor is missing or not listed.
    """
    for file in sorted(set(manifest.tensors.values())):
        listed = {name for name, where in manifest.tensors.items() if where == file}
        found = tensor_names(folder / file)
        for name in sorted(listed - found):
            raise CheckpointError(f"{folder / file} lacks the tensor {name}.")
        for name in sorted(found - listed):
            raise CheckpointError(f"{folder / file} has {name}, which the checkpoint doesn't list.")


def read_layers(folder: Path, manifest: Manifest) -> None:
    """Read and check the tensors of each sparse layer.

    Raises:
        CheckpointError: a tensor has another shape or dtype, or a mask has another pattern.
    """
    with _Reader(folder, manifest, torch.device("cpu"), None) as reader:
        for plan in sparse_plans(manifest.plans):
            _read_parts(plan, manifest, reader)


def _keep_parameters(model: nn.Module, undo: ExitStack) -> None:
    for module in model.modules():
        for kind in ("_parameters", "_buffers"):
            undo.callback(module.__dict__.__setitem__, kind, dict(getattr(module, kind)))


def _install(
    model: nn.Module,
    manifest: Manifest,
    reader: _Reader,
    on_fallback: OnFallback,
    undo: ExitStack,
) -> list[tuple[Tensor, Tensor]]:
    """Install the compressed weights in the model."""
    plans = sparse_plans(manifest.plans)
    parameters = dict(model.named_parameters())
    for plan in plans:
        parameter = parameters.get(plan.parameter_name)
        if parameter is None or tuple(parameter.shape) != plan.layout.shape:
            got = "has none" if parameter is None else f"has shape {tuple(parameter.shape)}"
            raise CheckpointError(
                f"{reader.folder} holds {plan.parameter_name} of shape {plan.layout.shape}; the "
                f"model {got}. Make the model with the same configuration."
            )

    def make_parts(plan: SparsePlan, dense: Tensor) -> Parts:
        return _read_parts(plan, manifest, reader)

    return install(
        model, plans, make_parts, storage_named(manifest.config.storage), on_fallback, undo
    )


def _read_parts(plan: SparsePlan, manifest: Manifest, reader: _Reader) -> Parts:
    entry, layout, pattern = manifest.sparse[plan.name], plan.layout, plan.pattern
    path, _, attribute = plan.parameter_name.rpartition(".")
    prefix = f"{path}." if path else ""
    beside = f"{prefix}{sparse_name(attribute)}."
    rows, width = layout.stack * layout.d_out, layout.d_in * pattern.n // pattern.m
    shape = storage_named(manifest.config.storage).shape(rows, layout.d_in, pattern)
    kept = reader.read(f"{prefix}{values_name(attribute)}", shape)
    if not kept.is_floating_point():
        raise CheckpointError(f"{reader.folder}: the values of {plan.name} are {kept.dtype}.")
    forward = reader.read(f"{beside}forward_bits", (rows, packed_width(layout.d_in)), torch.uint8)
    backward = reader.read(f"{beside}backward_bits", (rows, packed_width(width)), torch.uint8)
    problem = ""
    if not forward.is_meta:
        problem = packed_masks_problem(forward, backward, layout.d_in, pattern)
    if problem:
        raise CheckpointError(f"{reader.folder}: {plan.name} should be {pattern}, but {problem}.")
    adapter = None
    if entry.rank is not None:
        a = reader.read(f"{beside}lora_A", (layout.stack * entry.rank, layout.d_in))
        b = reader.read(f"{beside}lora_B", (rows, entry.rank))
        adapter = Adapter(a, b, entry.scale, entry.adapter_active)
    start = Start(None) if kept.is_meta else None
    return Parts(kept, forward, backward, adapter, start)


def _move_buffers(
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


def _fill(model: nn.Module, manifest: Manifest, reader: _Reader) -> list[tuple[Tensor, Tensor]]:
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
