"""Save a compiled model to a checkpoint."""

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from slope_fx.checkpoints.files import replaced_whole
from slope_fx.checkpoints.manifest import (
    MANIFEST,
    Manifest,
    SparseEntry,
    describe_files,
    read_manifest,
    tensor_names,
)
from slope_fx.checkpoints.training import collect_training, write_training
from slope_fx.errors import CheckpointError
from slope_fx.record import record_of, sparse_weights
from slope_fx.sparse.blank import check_filled
from slope_fx.sparse.weight import whole
from slope_fx.version import __version__

# Not the file name of transformers: its from_pretrained would read the files, find most of the
# weights missing, and initialize them at random.
_SHARDS = "slope_fx{suffix}.safetensors"


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    training: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a compiled model to the folder ``path``, and replace an earlier checkpoint there.

    The write is atomic: the folder is written under a temporary name, flushed to the disk, and
    renamed. An interrupted write leaves the earlier checkpoint intact. The checkpoint contains
    the trained tensors (values, packed masks, adapters, all other parameters and buffers) in
    safetensors files, and JSON. Under ``torch.distributed`` all ranks must call this function;
    rank 0 writes.

    Args:
        model: the object that ``compile`` or ``load_pretrained`` returned.
        path: a folder. An existing folder must be empty or an earlier checkpoint.
        tokenizer: an object with a ``save_pretrained`` method, saved into the same folder.
        training: the state of the run, by name: objects with a ``state_dict`` (optimizer,
            learning-rate scheduler, ``Schedule``, GradScaler), or plain data of numbers, strings,
            tensors, lists and mappings. The random states of torch, Python and NumPy are saved
            with it. See :func:`slope_fx.load_training`.
        max_shard_size: maximum size of a file of tensors, in bytes or as "5GB".

    Returns:
        The folder.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned, or a layer of it is not
            initialized.
        CheckpointError: ``path`` contains other files or cannot be written, or an object cannot
            be stored without pickle.
    """
    for weight in sparse_weights(model).values():
        check_filled(weight)
    path = Path(path)
    _check_target(path)
    named, aliases = named_tensors(model)
    shards, tensors = _split(named, max_shard_size)
    collected = None if training is None else collect_training(training)
    if not _writes():
        for names in shards.values():
            for name in names:
                whole(named[name])  # a collective, where the model is sharded
        return path
    with replaced_whole(path) as folder:
        for file, names in shards.items():
            save_file({n: _stored(named[n]) for n in names}, folder / file, {"format": "pt"})
        _write_configuration(folder, model, tokenizer)
        if collected is not None:
            write_training(folder, *collected)
        write_manifest(folder, model, tensors, aliases)
        for made in folder.glob("*.safetensors"):  # safetensors gives rights to the owner only
            shutil.copymode(folder / MANIFEST, made)
    return path


def describe_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Add a manifest to a folder to which another tool saved ``model``.

    The folder then is a checkpoint of slope_fx. It must contain all tensors of the model in
    safetensors files, under their names in the model, as the Trainer's ``checkpoint-N`` does.

    Args:
        model: the object that ``compile`` returned.
        path: the folder.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
        CheckpointError: the folder lacks a tensor of the model, or has another tensor.
    """
    folder = Path(path)
    named, aliases = named_tensors(model)
    names_of: dict[str, list[str]] = {name: [name] for name in named}
    for alias, name in aliases.items():
        names_of[name].append(alias)
    stored = {n: f.name for f in sorted(folder.glob("*.safetensors")) for n in tensor_names(f)}
    tensors, other_names = {}, {}
    for name, names in names_of.items():
        kept = [n for n in names if n in stored]
        if not kept:
            raise CheckpointError(f"{folder} has no tensor {name}, which the model has.")
        tensors[kept[0]] = stored.pop(kept[0])
        other_names.update({n: kept[0] for n in names if n != kept[0]})
    if stored:
        raise CheckpointError(f"{folder} has {next(iter(stored))}, which the model doesn't have.")
    write_manifest(folder, model, tensors, other_names)


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The parameters and persistent buffers of ``model`` by name, and the aliases of shared ones.

    Returns:
        Name -> tensor, with each tensor once; and other name -> name of the same tensor.

    Raises:
        CheckpointError: the state dict contains an object that is not a tensor.
    """
    named: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"the model's state has {name}, a {type(tensor).__name__}: only tensors can be "
                "stored without pickle. Keep it elsewhere, or make it a buffer."
            )
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            named[name] = tensor
            first[id(tensor)] = name
    return named, aliases


def write_manifest(
    folder: Path, model: nn.Module, tensors: Mapping[str, str], aliases: Mapping[str, str]
) -> None:
    """Write the manifest of ``model`` and of the files in ``folder``."""
    record = record_of(model)
    entries = {
        name: SparseEntry(weight.rank, weight.scale, weight.adapter_active)
        for name, weight in sparse_weights(model).items()
    }
    ours = _configuration_files(folder)
    Manifest(
        version=__version__,
        model_class=_class_of(model).__name__,
        transformers=_is_transformers(model),
        config=record.config,
        plans=record.plans,
        sparse=entries,
        untraced_because=record.untraced_because,
        region=record.settings.region,
        graphs=record.graphs,
        tensors=dict(tensors),
        aliases=dict(aliases),
        files=describe_files(folder, {*tensors.values(), *ours}),
        frozen=tuple(
            name
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and not parameter.requires_grad
        ),
        buffers={
            name: str(buffer.dtype).removeprefix("torch.")
            for name, buffer in unstored_buffers(model).items()
        },
    ).write(folder)


def unstored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not in the state dict."""
    stored = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name not in stored}


def _configuration_files(folder: Path) -> set[str]:
    """The names of the other files of the model, without the files of the Trainer."""
    kinds = (".json", ".jinja", ".model", ".txt")
    return {
        file.name for file in folder.iterdir()
        if (file.suffix in kinds or file.name == "training.safetensors")
        and file.name not in (MANIFEST, "trainer_state.json")
    }  # fmt: skip


def _split(
    named: Mapping[str, Tensor], max_shard_size: int | str
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The tensor names of each file, and the file name of each tensor."""
    # The split needs only sizes, so meta tensors are enough.
    sizes = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in named.items()}
    try:
        split = split_torch_state_dict_into_shards(
            sizes, filename_pattern=_SHARDS, max_shard_size=max_shard_size
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"max_shard_size={max_shard_size!r}: {error}.") from None
    return dict(split.filename_to_tensors), dict(split.tensor_to_filename)


def _stored(tensor: Tensor) -> Tensor:
    tensor = whole(tensor.detach()).cpu().contiguous()
    # safetensors refuses tensors that share a storage, so a view is stored as a copy.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_configuration(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    if _is_transformers(model):
        config: Any = model.config
        before = getattr(config, "architectures", None)
        config.architectures = [_class_of(model).__name__]
        try:
            config.save_pretrained(folder)
        finally:
            config.architectures = before
        if getattr(model, "generation_config", None) is not None and model.can_generate():  # type: ignore[operator]
            model.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    if tokenizer is not None:
        if not hasattr(tokenizer, "save_pretrained"):
            raise CheckpointError(
                f"tokenizer is a {type(tokenizer).__name__}; it must have a save_pretrained method."
            )
        tokenizer.save_pretrained(folder)


def _is_transformers(model: nn.Module) -> bool:
    """Whether transformers can build the model from its configuration."""
    return _class_of(model).__module__.startswith("transformers.") and hasattr(model, "config")


def _class_of(model: nn.Module) -> type[nn.Module]:
    """The original class of the model, before compile or FSDP replaced it."""
    base: type[nn.Module] = getattr(type(model), "_slope_kind").base  # noqa: B009
    return base


def _check_target(path: Path) -> None:
    if path.is_file() or path.is_symlink():
        raise CheckpointError(f"path={str(path)!r} is a file or a link; it must be a folder.")
    here = os.getcwd()
    if os.path.commonpath([here, os.path.abspath(path)]) == os.path.abspath(path):
        raise CheckpointError(
            f"path={str(path)!r} is the working directory, or holds it, and would be replaced. "
            "Choose a folder in it."
        )
    if not path.is_dir():
        return
    others = {file.name for file in path.iterdir()}
    if MANIFEST in others:
        with contextlib.suppress(CheckpointError):
            others -= {MANIFEST, *read_manifest(path).files}
    if others:
        raise CheckpointError(
            f"path={str(path)!r} is a folder that holds {min(others)}, which doesn't belong to a "
            "checkpoint of slope_fx and would be deleted. Choose an empty or a new folder."
        )


def _writes() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
