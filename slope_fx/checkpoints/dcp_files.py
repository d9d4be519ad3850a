"""Convert a folder of ``torch.distributed.checkpoint`` to a checkpoint, and back, in one process.

Neither way builds the model. Tensors are read and written a few at a time.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from slope_fx.checkpoints.dcp import DCP_MODEL, DCP_OPTIMIZER, DCP_REST
from slope_fx.checkpoints.files import files_in, replaced_whole
from slope_fx.checkpoints.layers import check_names
from slope_fx.checkpoints.manifest import (
    Manifest,
    check_files,
    describe_files,
    read_manifest,
)
from slope_fx.checkpoints.tensors import Described, TensorReader, TensorWriter, ordered
from slope_fx.checkpoints.training import STATES, TREE, read_tree
from slope_fx.checkpoints.trees import TENSOR, decode, decode_inline, encode_inline
from slope_fx.checkpoints.writing import STEM, Wanted, plan_files, write_index
from slope_fx.errors import CheckpointError, first_line

TRAINING = "training"
"""The name under which a converted state is stored, as in ``{"training": TrainingState(...)}``."""
_AT_ONCE = 2**28  # bytes


def is_dcp(folder: Path) -> bool:
    """Whether a folder was written by ``torch.distributed.checkpoint``."""
    return (folder / ".metadata").is_file()


def to_checkpoint(
    source: Path, target: Path, tokenizer: Any, max_shard_size: int | str = "5GB"
) -> Path:
    """Write the TrainingState in ``source`` as ``save_pretrained`` would, with a tokenizer or None.

    Raises:
        CheckpointError: ``source`` holds no TrainingState, or several, or is damaged.
    """
    stored = _Stored(source)
    rest = json.loads(stored.rest)
    manifest = Manifest.from_dict(rest["manifest"], str(source))
    model = {n: d for n, d in stored.described(DCP_MODEL).items() if n not in rest["aliases"]}
    data, states = _training_of(rest, stored)
    with replaced_whole(target) as folder:
        written: dict[str, tuple[int, str]] = {}
        where: dict[str, dict[str, str]] = {}
        for stem, described in ((STEM, model), (STATES, states)):
            wanted = [Wanted(name, kind, (0,)) for name, kind in described.items()]
            files = plan_files(wanted, [0], max_shard_size, stem)
            where[stem] = {name: file.name for file in files for name in file.tensors}
            part = DCP_MODEL if stem == STEM else DCP_OPTIMIZER
            if stem == STEM:
                write_index(folder, files)
            for file in files:
                writer = TensorWriter(folder / file.name, file.tensors)
                for tensor in stored.read(part, ordered(file.tensors), described):
                    writer.add(tensor)
                written[file.name] = writer.close()
        for name, text in rest["files"].items():
            (folder / name).write_text(text)
        (folder / TREE).write_text(json.dumps({**data, "files": where[STATES]}))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        others = describe_files(folder, files_in(folder) - set(written))
        dataclasses.replace(
            manifest, tensors=where[STEM], aliases=rest["aliases"], files={**written, **others}
        ).write(folder)
    return target


class _Stored:
    """A TrainingState in a folder of DCP."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.metadata: Metadata = FileSystemReader(folder).read_metadata()
        except Exception as error:  # pickle and the file system raise many types
            raise CheckpointError(f"{folder} can't be read by DCP: {first_line(error)}") from error
        self._paths: Mapping[str, Any] = self.metadata.planner_data or {}
        ends = [key for key, path in self._paths.items() if path[-1] == DCP_REST]
        if len(ends) != 1:
            raise CheckpointError(
                f"{folder} has {len(ends) or 'no'} states of slope_fx.checkpoints.TrainingState. "
                "Save one: torch.distributed.checkpoint.save({'training': TrainingState(model, "
                "optimizer, schedule)}, checkpoint_id=...)."
            )
        self._prefix = tuple(self._paths[ends[0]][:-1])
        self.rest: str = self._load({ends[0]: ""})[ends[0]]
        self._keys: dict[tuple[str, str], str] = {}

    def entries(self, part: str) -> Iterator[tuple[tuple[str, ...], str]]:
        """The paths in a part of the state, and the key of each."""
        begin = (*self._prefix, part)
        for key, path in self._paths.items():
            if tuple(path[: len(begin)]) == begin:
                yield tuple(path[len(begin) :]), key

    def described(self, part: str) -> dict[str, Described]:
        """The tensors of the model, by name."""
        found = {}
        for path, key in self.entries(part):
            self._keys[part, path[0]] = key
            found[path[0]] = self.describe(key)
        return found

    def describe(self, key: str) -> Described:
        """The shape and the dtype of a tensor."""
        about = self.metadata.state_dict_metadata[key]
        if not isinstance(about, TensorStorageMetadata):
            raise CheckpointError(f"{self.folder}: {key} is not a tensor.")
        return Described.of(
            key, torch.empty(about.size, dtype=about.properties.dtype, device="meta")
        )

    def is_tensor(self, key: str) -> bool:
        """Whether a key is of a tensor."""
        return isinstance(self.metadata.state_dict_metadata[key], TensorStorageMetadata)

    def alias(self, part: str, name: str, key: str) -> None:
        """Read the tensor of ``key`` under another name."""
        self._keys[part, name] = key

    def value(self, key: str) -> Any:
        """An object that is not a tensor."""
        return self._load({key: 0})[key]

    def read(
        self, part: str, names: Iterable[str], described: Mapping[str, Described]
    ) -> Iterator[Tensor]:
        """The named tensors in order, read a few at a time."""
        waiting: list[str] = []
        size = 0
        for name in [*names, None]:
            if name is not None:
                waiting.append(name)
                size += described[name].nbytes
            if waiting and (name is None or size >= _AT_ONCE):
                empty = {
                    self._keys[part, n]: torch.empty_like(described[n].empty(), device="cpu")
                    for n in waiting
                }
                self._load(empty)
                yield from (empty[self._keys[part, n]] for n in waiting)
                waiting, size = [], 0

    def _load(self, state: dict[str, Any]) -> dict[str, Any]:
        with _readable("read", self.folder):
            load(state, storage_reader=FileSystemReader(self.folder), no_dist=True)
        return state


@contextmanager
def _readable(what: str, folder: Path) -> Iterator[None]:
    """Gives errors of DCP, which do not derive from Exception, the class of slope_fx."""
    try:
        yield
    except CheckpointException as error:
        reason = first_line(next(iter(error.failures.values()))[0])
        raise CheckpointError(f"{folder} can't be {what} by DCP: {reason}") from error


def _training_of(
    rest: Mapping[str, Any], stored: _Stored
) -> tuple[dict[str, Any], dict[str, Described]]:
    """``training.json`` without its files, and the tensors of the optimizers."""
    without = set(rest["without_state"])
    entries: dict[str, list[tuple[str, str]]] = {}
    for path, key in stored.entries(DCP_OPTIMIZER):
        if path[0] not in without:
            entries.setdefault(path[0], []).append((".".join(path[1:]), key))
    parts = {
        name: {"of": part["of"], "trees": [_external(tree) for tree in part["trees"]]}
        for name, part in rest["parts"].items()
    }
    described: dict[str, Described] = {}
    parameters = {}
    if len(rest["groups"]) > 1:
        raise CheckpointError(
            f"{stored.folder} was saved by ranks with different optimizers, as in a pipeline. "
            "Only DCP itself can load it."
        )
    optimizers = rest["groups"][0] if rest["groups"] else []
    for number, groups in enumerate(optimizers):
        name = "optimizer" if len(optimizers) == 1 else f"optimizer_{number}"
        names: list[str] = []
        states: list[Any] = []
        saved: list[Any] = []
        for group in decode_inline(groups):
            indices = list(range(len(names), len(names) + len(group["params"])))
            names += group["params"]
            own = {**group, "params": indices}
            saved.append({"items": [[k, _external(encode_inline(v, k))] for k, v in own.items()]})
        for index, parameter in enumerate(names):
            items = []
            for key, where in entries.get(parameter, ()):
                if stored.is_tensor(where):
                    inner = str(len(described))
                    full = f"{name}/0/{inner}"
                    described[full] = stored.describe(where)
                    stored.alias(DCP_OPTIMIZER, full, where)
                    items.append([key, {TENSOR: inner}])
                else:
                    items.append([key, stored.value(where)])
            if items:
                states.append([index, {"items": items}])
        tree = {"items": [["state", {"items": states}], ["param_groups", {"list": saved}]]}
        parts[name] = {"of": [0] * rest["world_size"], "trees": [tree]}
        parameters[name] = names
    data = {"world_size": rest["world_size"], "parameters": parameters, "parts": parts}
    return data, described


def _external(inline: Mapping[str, Any]) -> Any:
    if inline["tensors"]:
        raise CheckpointError(
            "a state beside the optimizer's holds tensors, which slope-fx convert doesn't support."
        )
    return inline["tree"]


def from_checkpoint(source: Path, target: Path, tokenizer: Any) -> Path:
    """Write the checkpoint in ``source`` as DCP would write its TrainingState.

    Load it with ``{"training": TrainingState(...)}``. A tokenizer is written beside it.

    Raises:
        CheckpointError: the checkpoint is damaged or of a frozen model, or its optimizer cannot be
            converted.
    """
    manifest = read_manifest(source)
    if manifest.inference is not None:
        raise CheckpointError(
            f"{source} is a frozen model, which no training state can hold. Convert the checkpoint "
            "of the model that was frozen."
        )
    check_files(source, manifest, hashes=True)
    check_names(source, manifest)
    names = {**dict.fromkeys(manifest.tensors), **manifest.aliases}
    with ExitStack() as stack:
        tensors = stack.enter_context(TensorReader(source, manifest.tensors))
        model = {name: tensors.read(original or name) for name, original in names.items()}
        rest: dict[str, Any] = {
            "world_size": 1,
            "manifest": dataclasses.replace(manifest, tensors={}, aliases={}, files={}).to_dict(),
            "aliases": dict(manifest.aliases),
            "files": {
                name: (source / name).read_text()
                for name in ("config.json", "generation_config.json")
                if name in manifest.files
            },
            "without_state": [],
            "groups": [],
            "parts": {},
        }
        states: dict[str, Any] = {}
        if TREE in manifest.files:
            data = read_tree(source)
            reader = stack.enter_context(TensorReader(source, data["files"]))
            rest["world_size"] = data["world_size"]
            states = _states_of(data, reader, model, rest, source)
        state = {DCP_MODEL: model, DCP_OPTIMIZER: states, DCP_REST: json.dumps(rest)}
        with replaced_whole(target) as folder, _readable("written", target):
            save({TRAINING: state}, checkpoint_id=folder, no_dist=True)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    return target


def _states_of(
    data: Mapping[str, Any],
    reader: TensorReader,
    model: Mapping[str, Tensor],
    rest: dict[str, Any],
    source: Path,
) -> dict[str, Any]:
    """The optimizers' states by parameter name. All else is added to ``rest``."""
    states: dict[str, Any] = {}
    optimizers = []
    for part, saved in data["parts"].items():
        if part not in data["parameters"]:
            rest["parts"][part] = {
                "of": saved["of"],
                "trees": [
                    encode_inline(decode(tree, _reading(part, index, reader, data)), part)
                    for index, tree in enumerate(saved["trees"])
                ],
            }
            continue
        if len(saved["trees"]) > 1:
            raise CheckpointError(f"{source}: {part!r} differs between the ranks that saved it.")
        state = decode(saved["trees"][0], _reading(part, 0, reader, data))
        names = data["parameters"][part]
        groups = [{**g, "params": [names[i] for i in g["params"]]} for g in state["param_groups"]]
        optimizers.append(encode_inline(groups, "param_groups"))
        own = {names[index]: entry for index, entry in state["state"].items() if entry}
        pattern = next(iter(own.items()), None)
        for name in names:
            # The structure must be the one that a TrainingState has in every phase.
            if name not in own and model[name].is_floating_point():
                rest["without_state"].append(name)
                if pattern is not None:
                    own[name] = _zeros(name, model, *pattern)
        states.update(own)
    if any(
        "param_groups" in dict(_items(tree))
        for part in rest["parts"].values()
        for tree in (t["tree"] for t in part["trees"])
    ):
        raise CheckpointError(
            f"{source} was written before parameter names were stored with an optimizer's state. "
            "Load it and save it again."
        )
    rest["groups"] = [optimizers] if optimizers else []
    return states


def _items(tree: Any) -> list[Any]:
    return tree.get("items", []) if isinstance(tree, dict) else []


def _reading(part: str, index: int, reader: TensorReader, data: Mapping[str, Any]) -> Any:
    prefix = "" if data.get("flat") else f"{part}/{index}/"
    return lambda kind, inner: reader.read(prefix + inner)


def _zeros(
    name: str, model: Mapping[str, Tensor], like: str, entry: Mapping[str, Any]
) -> dict[str, Any]:
    """A state of zeros for a parameter without one, of the kind that another one has."""
    made: dict[str, Any] = {}
    for key, value in entry.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            made[key] = torch.zeros_like(value) if isinstance(value, Tensor) else value
        elif value.shape == model[like].shape:
            made[key] = torch.zeros(model[name].shape, dtype=value.dtype)
        else:
            raise CheckpointError(
                f"{like}: {key} has another shape than its parameter, so the state of {name} "
                "can't be made up. Load the checkpoint and save its TrainingState."
            )
    return made
