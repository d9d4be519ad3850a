"""From a model to a checkpoint."""

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
from slope_fx.sparse.weight import whole
from slope_fx.version import __version__

# Not transformers' own name for such files: its from_pretrained would take them, find most of the
# weights missing, and make new ones at random.
_SHARDS = "slope_fx{suffix}.safetensors"


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    training: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a compiled model into the folder ``path``, in place of what was there.

    The folder is written under another name, flushed to the disk, and put in its place in one
    step: killed at any moment, the last good checkpoint remains. It holds the tensors as they are
    trained (compressed values, bit-packed masks, adapters, all else) in safetensors, and JSON.
    Under ``torch.distributed`` every rank calls this; rank 0 writes.

    Args:
        model: what ``compile`` or ``load_pretrained`` returned.
        path: a folder; one that exists must be empty or an earlier checkpoint.
        tokenizer: anything with ``save_pretrained``, to be put beside the weights.
        training: what a run needs to go on, by name: objects with a ``state_dict`` (optimizer,
            learning-rate scheduler, ``Schedule``, GradScaler), or plain data of numbers, strings,
            tensors, lists and mappings. The random states of torch, Python and NumPy go with it.
            See :func:`slope_fx.load_training`.
        max_shard_size: of one file of tensors: bytes, or "5GB".

    Returns:
        The folder.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
        CheckpointError: ``path`` holds something else, can't be written, or something can't be
            stored without pickle.
    """
    record_of(model)
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
        for made in folder.glob("*.safetensors"):  # which that library makes for the owner alone
            shutil.copymode(folder / MANIFEST, made)
    return path


def describe_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Make a folder that another tool saved ``model`` to a checkpoint of slope_fx.

    It must hold all of the model's tensors in safetensors, under their names, as the Trainer's
    ``checkpoint-N`` does; what is added is the manifest.

    Args:
        model: what ``compile`` returned.
        path: the folder.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
        CheckpointError: the folder lacks some of the model's tensors, or has others.
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
    """The parameters and persistent buffers of ``model`` by name, each once, and other names.

    Raises:
        CheckpointError: its state dict has something that isn't a tensor.
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
    """Describe the files in ``folder`` and the model they hold."""
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
    """The buffers that aren't in the state dict."""
    stored = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name not in stored}


def _configuration_files(folder: Path) -> set[str]:
    """What is beside the weights and belongs to the model; a trainer's own files are its own."""
    kinds = (".json", ".jinja", ".model", ".txt")
    return {
        file.name for file in folder.iterdir()
        if (file.suffix in kinds or file.name == "training.safetensors")
        and file.name not in (MANIFEST, "trainer_state.json")
    }  # fmt: skip


def _split(
    named: Mapping[str, Tensor], max_shard_size: int | str
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The tensors of each file, and the file of each tensor."""
    # Sizes are all that the split looks at; a model of meta tensors costs nothing.
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
    # Two views of one storage are two tensors here, and each is stored as it reads.
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
                f"tokenizer is a {type(tokenizer).__name__}; it must have a save_pretrained."
            )
        tokenizer.save_pretrained(folder)


def _is_transformers(model: nn.Module) -> bool:
    """Whether transformers can make the model from its configuration."""
    return _class_of(model).__module__.startswith("transformers.") and hasattr(model, "config")


def _class_of(model: nn.Module) -> type[nn.Module]:
    """The model's own class, whatever compile or FSDP has made of it."""
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
            f"path={str(path)!r} is a folder that holds {min(others)}, which isn't a checkpoint's "
            "of slope_fx and would be deleted. Choose an empty or a new one."
        )


def _writes() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
