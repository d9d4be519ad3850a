"""Save a compiled model to a checkpoint."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slope_fx.checkpoints.files import files_in, replaced_whole
from slope_fx.checkpoints.holders import choose_holders, describe_copies, prints_of_shards
from slope_fx.checkpoints.manifest import (
    MANIFEST,
    REPLACED,
    Manifest,
    SparseEntry,
    describe_files,
    read_manifest,
    tensor_names,
)
from slope_fx.checkpoints.together import Together
from slope_fx.checkpoints.training import STATES, TREE, collect_training, encode_training
from slope_fx.checkpoints.unstored import unstored_buffers
from slope_fx.checkpoints.writing import STEM, Wanted, plan_files, write_files, write_index
from slope_fx.errors import CheckpointError, UnsupportedError
from slope_fx.frozen import FrozenWeight
from slope_fx.hub import mark_configuration
from slope_fx.planning.plan import DensePlan, LinearPlan, SparsePlan
from slope_fx.record import record_of, sparse_weights, trainable_record_of
from slope_fx.sparse.blank import check_filled
from slope_fx.sparse.weight import SparseWeight
from slope_fx.version import __version__


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
    safetensors files, and JSON.

    After ``import slope_fx``, ``from_pretrained`` and ``pipeline`` of transformers open the folder
    of a transformers model: as a model that trains or a frozen one, as it was saved.

    Under ``torch.distributed`` all ranks must call this function, with a ``path`` on a file system
    that they share. They write at the same time, each its own files. A sharded tensor is gathered
    on its ranks, one tensor at a time. A tensor of which ranks hold different contents, as in a
    pipeline, is taken from the rank that trained it. If the write fails on one rank, it fails on
    all.

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
            initialized; or ``training`` is given, and the model is frozen.
        CheckpointError: ``path`` contains other files or cannot be written, an object cannot be
            stored without pickle, or ranks hold different contents of a tensor and which is right
            is unknown.
    """
    together, path = Together(), Path(path)
    with together.agreed():
        if training is not None:
            trainable_record_of(model)
        for weight in sparse_weights(model).values():
            check_filled(weight)
        if together.rank == 0:
            _check_target(path)
        _check_tokenizer(tokenizer)
        named, aliases = named_tensors(model)
        shards = prints_of_shards(named, together.world)
        encoded = None if training is None else encode_training(training, named)
    prints = together.gather(shards)
    with together.agreed():
        mine = describe_copies(named, aliases, prints)
    chosen = choose_holders(together, mine)
    described = describe_together(together, model)
    collected = None if encoded is None else collect_training(together, encoded)
    with replaced_whole(path, together) as folder:
        writers = [r for r, sees in enumerate(together.gather(folder.is_dir())) if sees]
        wanted = [Wanted(c.name, c.described, c.ranks) for c in chosen]
        files = plan_files(wanted, writers, max_shard_size, STEM)
        held = {c.name: named[n] for c in chosen for n in (c.name, *c.aliases) if n in named}
        states = []
        written = write_files(together, folder, files, held)
        if collected is not None:
            states = plan_files(collected.wanted, writers, max_shard_size, STATES)
            written |= write_files(together, folder, states, collected.held)
        if together.rank == 0:
            write_configuration(folder, model, tokenizer)
            write_index(folder, files)
            if collected is not None:
                where = {name: file.name for file in states for name in file.tensors}
                (folder / TREE).write_text(json.dumps({**collected.data, "files": where}))
            dataclasses.replace(
                described,
                tensors={name: file.name for file in files for name in file.tensors},
                aliases={alias: c.name for c in chosen for alias in c.aliases},
                files={**written, **describe_files(folder, files_in(folder) - set(written))},
            ).write(folder)
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
    if (folder / "config.json").exists():
        mark_configuration(folder)
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
        # A tensor under several names may be stored under each, as by the Trainer under FSDP2.
        places = [stored.pop(n) for n in kept]
        tensors[kept[0]] = places[0]
        other_names.update({n: kept[0] for n in names if n != kept[0]})
    if stored:
        raise CheckpointError(f"{folder} has {next(iter(stored))}, which the model doesn't have.")
    files = describe_files(folder, {*tensors.values(), *_configuration_files(folder)})
    manifest = describe_model(model)
    dataclasses.replace(manifest, tensors=tensors, aliases=other_names, files=files).write(folder)


def save_by_transformers(
    model: nn.Module, path: str | os.PathLike[str], *args: Any, **options: Any
) -> None:
    """``model.save_pretrained`` of a compiled transformers model, in the format of slope_fx.

    Raises:
        StateError: a layer is not initialized.
        UnsupportedError: an option would make a folder that is no checkpoint of slope_fx.
    """
    for name in ("push_to_hub", "variant", "distributed_checkpoint"):
        if options.get(name) or (name == "push_to_hub" and len(args) > 2 and args[2]):
            raise UnsupportedError(
                f"save_pretrained({name}={options.get(name, True)!r}) can't write a checkpoint of "
                "slope_fx. Use slope_fx.save_pretrained(model, path), and upload the folder with "
                "huggingface_hub.upload_folder."
            )
    for weight in sparse_weights(model).values():
        check_filled(weight)
    options.setdefault("save_original_format", False)  # the names of the layers are those here
    base: Any = _class_of(model)
    base.save_pretrained(model, path, *args, **options)
    writes = options.get("is_main_process", args[0] if args else True)
    if writes and not getattr(model, "_hf_peft_config_loaded", False):
        describe_checkpoint(model, path)


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


def describe_model(model: nn.Module) -> Manifest:
    """The manifest of ``model`` as this rank holds it, without tensors and files."""
    record = record_of(model)
    return Manifest(
        version=__version__,
        model_class=_class_of(model).__name__,
        transformers=_is_transformers(model),
        config=record.config,
        plans=record.plans,
        sparse={
            name: SparseEntry(weight.rank, weight.scale, weight.adapter_active, _dtype_of(weight))
            for name, weight in sparse_weights(model).items()
        },
        untraced_because=record.untraced_because,
        region=record.settings.region,
        graphs=record.graphs,
        inference=record.frozen,
        tensors={},
        aliases={},
        files={},
        frozen=tuple(
            name
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and not parameter.requires_grad
            if record.frozen is None
        ),
        buffers={
            name: str(buffer.dtype).removeprefix("torch.")
            for name, buffer in unstored_buffers(model).items()
        },
    )


def _dtype_of(weight: SparseWeight | FrozenWeight) -> str | None:
    """The dtype that codes do not show."""
    if not isinstance(weight, FrozenWeight) or weight.scales is None:
        return None
    return str(weight.dtype).removeprefix("torch.")


def describe_together(together: Together, model: nn.Module) -> Manifest:
    """The manifest of the model that the ranks hold together, without tensors and files.

    Raises:
        CheckpointError: the ranks compiled the model in different ways, or are in different
            phases.
    """
    different, which = together.distinct(describe_model(model).to_dict())
    parts = [Manifest.from_dict(data, f"the manifest of rank {which.index(i)}")
             for i, data in enumerate(different)]  # fmt: skip
    plans: dict[str, LinearPlan] = {}
    sparse: dict[str, SparseEntry] = {}
    first_with: dict[str, int] = {}
    for index, part in enumerate(parts):
        for plan in part.plans:
            here = (plan, part.sparse.get(plan.name))
            known = (plans.get(plan.name), sparse.get(plan.name))
            if known[0] is None or _gone(known[0]):
                plans[plan.name], first_with[plan.name] = plan, which.index(index)
                if here[1] is not None:
                    sparse[plan.name] = here[1]
            elif here != known and not _gone(plan):
                raise CheckpointError(
                    f"{plan.name} is {_said(*known)} on rank {first_with[plan.name]} and "
                    f"{_said(*here)} on rank {which.index(index)}. Compile the model in the same "
                    "way on all ranks, and step a Schedule on each."
                )
    return dataclasses.replace(
        parts[0],
        plans=tuple(plans.values()),
        sparse=sparse,
        graphs={path: number for part in parts for path, number in part.graphs.items()},
        frozen=tuple(dict.fromkeys(name for part in parts for name in part.frozen)),
        buffers={name: kind for part in parts for name, kind in part.buffers.items()},
    )


def _gone(plan: LinearPlan) -> bool:
    return isinstance(plan, DensePlan) and plan.reason == REPLACED


def _said(plan: LinearPlan | None, entry: SparseEntry | None) -> str:
    if not isinstance(plan, SparsePlan) or entry is None:
        return "dense"
    adapter = "" if entry.rank is None else (
        f" with {'an active' if entry.adapter_active else 'an idle'} adapter of rank {entry.rank}"
    )  # fmt: skip
    return f"{plan.pattern} of shape {plan.shape}{adapter}"


def _configuration_files(folder: Path) -> set[str]:
    """The names of the other files of the model, without the files of the Trainer."""
    kinds = (".json", ".jinja", ".model", ".txt")
    return {
        file.name for file in folder.iterdir()
        if file.suffix in kinds and file.name not in (MANIFEST, "trainer_state.json")
    }  # fmt: skip


def write_configuration(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    """Write the configuration of a transformers model, and the tokenizer, into ``folder``."""
    if _is_transformers(model):
        config: Any = model.config
        before = config.architectures, config.dtype
        config.architectures, config.dtype = [_class_of(model).__name__], model.dtype
        try:
            config.save_pretrained(folder)
        finally:
            config.architectures, config.dtype = before
        mark_configuration(folder)
        if getattr(model, "generation_config", None) is not None and model.can_generate():  # type: ignore[operator]
            model.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise CheckpointError(
            f"tokenizer is a {type(tokenizer).__name__}; it must have a save_pretrained method."
        )


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
            others -= {MANIFEST, *(name.split("/")[0] for name in read_manifest(path).files)}
    if others:
        raise CheckpointError(
            f"path={str(path)!r} is a folder that holds {min(others)}, which doesn't belong to a "
            "checkpoint of slope_fx and would be deleted. Choose an empty or a new folder."
        )
