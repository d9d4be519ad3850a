"""From a checkpoint to a model."""

import importlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from slope_fx.checkpoints.manifest import (
    Manifest,
    check_files,
    read_manifest,
    tensor_names,
)
from slope_fx.checkpoints.saving import named_tensors, unstored_buffers
from slope_fx.compiler import CompileOptions, attach, check_model, make_record
from slope_fx.errors import ArgumentError, CheckpointError, first_line
from slope_fx.sparse.install import install, warn_of_stale_optimizers
from slope_fx.kernels.engines import AUTO
from slope_fx.planning.plan import LinearPlan, parse_dtype
from slope_fx.planning.regions import Region
from slope_fx.backend.settings import BackendFunction
from slope_fx.sparse.weight import (
    OnFallback,
    Parts,
    packed_masks_problem,
    sparse_name,
    values_name,
)


def load_pretrained(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    verify: bool = True,
    backend: str | BackendFunction | None = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    region: Region | None = None,
    engine: str = AUTO,
    passes: Sequence[Any] = (),
    disable_passes: Sequence[str] = (),
    enable_passes: Sequence[str] = (),
    on_fallback: OnFallback = "warn",
) -> nn.Module:
    """The compiled model that :func:`slope_fx.save_pretrained` wrote: to train on, or to use.

    A model of transformers is made from the checkpoint's ``config.json`` and comes evaluated, as
    from ``from_pretrained``: call ``.train()`` to train it. Adapters take part if they did when
    it was saved.

    Args:
        path: the checkpoint's folder.
        model: for a model that isn't from transformers: a new dense one, as it was before
            ``compile``; its weights are replaced. Its mode stays.
        device: where to put it.
        dtype: of its floating-point tensors, "bfloat16" or ``torch.bfloat16``; None as they
            were saved.
        verify: check the files' hashes before anything is read.
        backend, mode, options, dynamic, fullgraph, engine, passes, disable_passes, enable_passes,
            on_fallback: as of :func:`slope_fx.compile`.
        region: the same; None as it was saved.

    Returns:
        The model.

    Raises:
        CheckpointError: anything is missing, left over, truncated, changed, of another pattern
            or size, or from a newer format version; ``model``, if it was given, is then as it was.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest, hashes=verify)
    check_names(folder, manifest)
    to = parse_dtype(dtype)
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device={device!r}: {first_line(error)}") from None
    how = CompileOptions(
        backend, mode, options, dynamic, fullgraph, region or manifest.region, engine, passes,  # type: ignore[arg-type]
        disable_passes, enable_passes, on_fallback,
    )  # fmt: skip
    settings = how.settings()
    given = model is not None
    if model is None:
        model = _from_configuration(folder, manifest)
    else:
        check_model(model)
    with _Reader(folder, manifest, torch.device(device), to) as reader, ExitStack() as undo:
        _keep_parameters(model, undo)
        replaced = [parameter for parameter in model.parameters() if parameter.requires_grad]
        _install(model, manifest, reader, on_fallback, undo)
        _fill(model, manifest, reader)
        record = make_record(
            model,
            manifest.plans,
            manifest.untraced_because,
            manifest.graphs,
            how,
            settings,
            manifest.adapter_init,
        )
        attach(model, record, undo)
        for name in manifest.frozen:
            model.get_parameter(name).requires_grad_(False)
        undo.pop_all()
    _move_buffers(model, manifest, torch.device(device), to)
    if not given:
        return model.eval()
    warn_of_stale_optimizers(replaced)
    return model


class _Reader:
    """The checkpoint's tensors, by name."""

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
        """The tensor ``name``, on the device and in the dtype that were asked for.

        Raises:
            CheckpointError: there is none, or it has another shape or dtype.
        """
        name = self.manifest.aliases.get(name, name)
        file = self.manifest.tensors.get(name)
        if file is None:
            raise CheckpointError(f"{self.folder} has no tensor {name}, which the model needs.")
        if file not in self._open:
            opened = safe_open(str(self.folder / file), "pt", device="cpu")
            self._open[file] = self._stack.enter_context(opened)
        tensor: Tensor = self._open[file].get_tensor(name)
        if tuple(tensor.shape) != shape or (kind is not None and tensor.dtype != kind):
            want = f"{kind} {shape}" if kind is not None else f"{shape}"
            raise CheckpointError(
                f"{self.folder}: {name} is {tensor.dtype} {tuple(tensor.shape)}, where the model "
                f"needs {want}."
            )
        self.unread.discard(name)
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype or tensor.dtype)
        # A copy: what safetensors gives may be a view of the file.
        return tensor.to(self.device, copy=True)


def check_names(folder: Path, manifest: Manifest) -> None:
    """See that the files hold just the tensors that the manifest lists."""
    for file in sorted(set(manifest.tensors.values())):
        listed = {name for name, where in manifest.tensors.items() if where == file}
        found = tensor_names(folder / file)
        for name in sorted(listed - found):
            raise CheckpointError(f"{folder / file} lacks the tensor {name}.")
        for name in sorted(found - listed):
            raise CheckpointError(f"{folder / file} has {name}, which the checkpoint doesn't list.")


def read_layers(folder: Path, manifest: Manifest) -> None:
    """Read each sparse layer, and throw it away.

    Raises:
        CheckpointError: a tensor has another shape or dtype, a mask another pattern.
    """
    with _Reader(folder, manifest, torch.device("cpu"), None) as reader:
        for plan in manifest.plans:
            if plan.name in manifest.sparse:
                _read_parts(plan, manifest, reader)


def _from_configuration(folder: Path, manifest: Manifest) -> nn.Module:
    """The model of transformers that ``config.json`` describes, its weights unset."""
    if not manifest.transformers:
        raise CheckpointError(
            f"{folder} holds a {manifest.model_class}, which is not a model of transformers: pass "
            "model=, a new dense one made as for slope_fx.compile."
        )
    try:
        transformers = importlib.import_module("transformers")
        initialization = importlib.import_module("transformers.initialization")
    except ImportError as error:
        raise CheckpointError(f"{folder} needs transformers 5: {error}.") from error
    kind = getattr(transformers, str(manifest.model_class), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{folder} holds a {manifest.model_class}, which transformers "
            f"{transformers.__version__} doesn't have. Install a version that does."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} can't be read: {first_line(error)}"
        ) from None
    # Unset memory isn't touched until it is replaced, so the dense weights take none.
    with torch.random.fork_rng(devices=[]), initialization.no_init_weights():
        model: nn.Module = kind(config)
    model.tie_weights()  # type: ignore[operator]
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


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
) -> None:
    """Put the compressed weights into the model."""
    plans = [plan for plan in manifest.plans if plan.name in manifest.sparse]
    parameters = dict(model.named_parameters())
    for plan in plans:
        parameter = parameters.get(plan.parameter_name)
        assert plan.layout is not None
        if parameter is None or tuple(parameter.shape) != plan.layout.shape:
            got = "has none" if parameter is None else f"has shape {tuple(parameter.shape)}"
            raise CheckpointError(
                f"{reader.folder} holds {plan.parameter_name} of shape {plan.layout.shape}; the "
                f"model {got}. Make the model with the same configuration."
            )

    def make_parts(plan: LinearPlan, dense: Tensor) -> Parts:
        return _read_parts(plan, manifest, reader)

    install(model, plans, make_parts, on_fallback, undo)


def _read_parts(plan: LinearPlan, manifest: Manifest, reader: _Reader) -> Parts:
    assert plan.pattern is not None
    assert plan.layout is not None
    entry, layout, (n, m) = (
        manifest.sparse[plan.name],
        plan.layout,
        (plan.pattern.n, plan.pattern.m),
    )
    path, _, attribute = plan.parameter_name.rpartition(".")
    prefix = f"{path}." if path else ""
    beside = f"{prefix}{sparse_name(attribute)}."
    rows, kept = layout.stack * layout.d_out, layout.d_in * n // m
    values = reader.read(f"{prefix}{values_name(attribute)}", (rows, kept))
    if not values.is_floating_point():
        raise CheckpointError(f"{reader.folder}: the values of {plan.name} are {values.dtype}.")
    forward = reader.read(f"{beside}forward_bits", (rows, -(-layout.d_in // 8)), torch.uint8)
    backward = reader.read(f"{beside}backward_bits", (rows, -(-kept // 8)), torch.uint8)
    problem = packed_masks_problem(forward, backward, layout.d_in, plan.pattern)
    if problem:
        raise CheckpointError(
            f"{reader.folder}: {plan.name} should be {plan.pattern}, but {problem}."
        )
    if entry.rank is None:
        return Parts(values, forward, backward)
    a = reader.read(f"{beside}lora_A", (layout.stack * entry.rank, layout.d_in))
    b = reader.read(f"{beside}lora_B", (rows, entry.rank))
    return Parts(values, forward, backward, a, b, entry.scale, entry.adapter_active)


def _move_buffers(
    model: nn.Module, manifest: Manifest, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Put the buffers that aren't stored where the rest is, and cast them as they were."""
    for name in unstored_buffers(model):
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        buffer = owner._buffers[attribute]
        assert buffer is not None
        kind = None
        if dtype is None and buffer.is_floating_point():
            kind = getattr(torch, manifest.buffers.get(name, ""), None)
        owner._buffers[attribute] = buffer.to(device, kind or buffer.dtype)


def _fill(model: nn.Module, manifest: Manifest, reader: _Reader) -> None:
    """Give every other parameter and buffer its stored value; see that nothing is left over."""
    named, aliases = named_tensors(model)
    _check_sharing(reader.folder, named, aliases, manifest)
    for name, tensor in named.items():
        stored = manifest.aliases.get(name, name)
        if stored in manifest.tensors and stored not in reader.unread:
            continue  # installed already
        value = reader.read(name, tuple(tensor.shape))
        if value.is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{reader.folder}: {name} is {value.dtype}, the model's {tensor.dtype}."
            )
        _assign(model, tensor, value)
    if reader.unread:
        names = sorted(reader.unread)
        raise CheckpointError(
            f"{reader.folder} has {names[0]}"
            + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
            + ", for which the model has no place."
        )


def _check_sharing(
    folder: Path, named: Mapping[str, Tensor], aliases: Mapping[str, str], manifest: Manifest
) -> None:
    """See that the model shares the parameters that the saved one shared."""

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


def _assign(model: nn.Module, old: Tensor, value: Tensor) -> None:
    """Put ``value`` in each place where ``old`` is."""
    new: Tensor = value
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(value, requires_grad=old.requires_grad)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is old:
                    tensors[name] = new  # type: ignore[assignment]
