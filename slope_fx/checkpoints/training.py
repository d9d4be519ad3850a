"""Save and load the training state: optimizers, schedules and random states.

State dicts are trees of mappings, lists, numbers and tensors. ``training.safetensors`` stores the
tensors. ``training.json`` stores the trees, with the names of the tensors in their places. Loading
therefore unpickles nothing. A state that differs between ranks is stored for each of them.
"""

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from slope_fx.checkpoints.holders import content_of, prints_of_shards
from slope_fx.checkpoints.manifest import (
    Manifest,
    check_files,
    check_hashes,
    read_manifest,
    tensor_names,
)
from slope_fx.checkpoints.randoms import random_states as current_random_states
from slope_fx.checkpoints.randoms import set_random_states, tell_of_new_rank
from slope_fx.checkpoints.tensors import Described, TensorReader
from slope_fx.checkpoints.together import Together
from slope_fx.checkpoints.trees import SHARDED, decode, encode, replace_leaves
from slope_fx.checkpoints.writing import Wanted
from slope_fx.errors import (
    CheckpointError,
    SlopeError,
    TrainingWarning,
    first_line,
    users_stacklevel,
)

TREE, STATES = "training.json", "training"
_RANDOM = "random_states"


@dataclass(frozen=True)
class Encoded:
    """The states of this rank: a tree for each part, and its tensors.

    Attributes:
        trees: part name -> tree.
        tensors: part name -> name in the tree -> tensor.
        parameters: name of an optimizer -> the names of its parameters in the model, in its order.
    """

    trees: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    parameters: dict[str, list[str]]


@dataclass(frozen=True)
class Collected:
    """The states of all ranks.

    Attributes:
        data: the content of ``training.json`` without the files of the tensors.
        wanted: the tensors to write.
        held: those of them that this rank holds.
    """

    data: dict[str, Any]
    wanted: list[Wanted]
    held: dict[str, Tensor]


def encode_training(training: Mapping[str, Any], named: Mapping[str, Tensor]) -> Encoded:
    """The states of this rank as plain data.

    Args:
        training: as for ``save_pretrained``.
        named: the parameters of the model by name.

    Raises:
        CheckpointError: an object in ``training`` cannot be stored without pickle.
    """
    if not isinstance(training, Mapping) or not all(isinstance(k, str) for k in training):
        raise CheckpointError(
            "training must map names to objects with a state_dict, or to plain data, such as "
            '{"optimizer": optimizer, "schedule": schedule, "step": step}.'
        )
    if _RANDOM in training:
        raise CheckpointError(
            f"training has {_RANDOM!r}, a reserved name: random states are always saved."
        )
    encoded = Encoded({}, {}, {})
    states = {name: _state_of(part) for name, part in training.items()}
    for name, state in {**states, _RANDOM: current_random_states()}.items():
        tensors: dict[str, Tensor] = {}
        encoded.trees[name] = encode(state, name, tensors)
        encoded.tensors[name] = tensors
        for tensor in tensors.values():
            Described.of(f"training: a tensor in {name}", tensor)  # refuses what can't be stored
    name_of = {id(tensor): name for name, tensor in named.items()}
    for name, part in training.items():
        parameters = _parameters(part)
        if parameters and all(id(p) in name_of for p in parameters):
            encoded.parameters[name] = [name_of[id(p)] for p in parameters]
    return encoded


def collect_training(together: Together, encoded: Encoded) -> Collected:
    """Bring the states of all ranks together. Tensors stay where they are."""
    parts: dict[str, Any] = {}
    wanted: list[Wanted] = []
    held: dict[str, Tensor] = {}
    for name, tree in encoded.trees.items():
        tensors = encoded.tensors[name]
        prints = together.gather(prints_of_shards(tensors, together.world))
        contents = [
            [inner, *Described.of(name, tensor).plain(), content_of(inner, tensor, prints)]
            for inner, tensor in tensors.items()
        ]
        different, of = together.distinct([tree, contents])
        parts[name] = {"of": of, "trees": [tree for tree, _ in different]}
        for index, (_, contents) in enumerate(different):
            ranks = tuple(rank for rank in range(together.world) if of[rank] == index)
            wanted += [
                Wanted(_stored_name(name, index, inner), Described(tuple(shape), dtype), ranks)
                for inner, shape, dtype, _ in contents
            ]
        mine = of[together.rank]
        held.update({_stored_name(name, mine, inner): t for inner, t in tensors.items()})
    data = {"world_size": together.world, "parameters": encoded.parameters, "parts": parts}
    return Collected(data, wanted, held)


def _stored_name(part: str, index: int, inner: str) -> str:
    return f"{part}/{index}/{inner}"


@dataclass(frozen=True)
class _Stored:
    """A tensor of a state that was not read yet."""

    name: str
    sharded: bool


def load_training(
    path: str | os.PathLike[str],
    training: Mapping[str, Any] | None = None,
    *,
    random_states: bool = True,
    verify: bool = True,
) -> dict[str, Any]:
    """Restore the optimizers, schedules and random states that ``save_pretrained`` saved.

    Under ``torch.distributed`` each rank calls this function. A rank reads only its part of the
    state of sharded parameters. The number of ranks may differ from that of the saved run, unless
    a state that was saved differs between its ranks.

    Args:
        path: folder of the checkpoint.
        training: the objects to load, by the names under which they were saved. Each has a
            ``load_state_dict`` method. Make them as for a new run, with the loaded model, after
            ``fully_shard``.
        random_states: whether to set the random states of torch, Python and NumPy, on each rank
            those that the rank had. To continue the run exactly, make this call the last one
            before the training loop.
        verify: whether to check the hashes of the files of the training state.

    Returns:
        The remaining saved state by name: plain data, and the state dicts of objects that are not
        in ``training``.

    Raises:
        CheckpointError: the checkpoint has no training state or is damaged, ``training`` names an
            object that was not saved, or an object refuses its state.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if TREE not in manifest.files:
        raise CheckpointError(
            f"{folder} has no training state: it was saved without training=. Only the model can "
            "be loaded from it."
        )
    training = {} if training is None else training
    if not isinstance(training, Mapping):
        raise CheckpointError(f"training is a {type(training).__name__}; it maps names to objects.")
    together = Together()
    check_files(folder, manifest, hashes=False)
    if verify:
        _check_hashes(folder, manifest, training, together)
    try:
        data = read_tree(folder)
        with TensorReader(folder, data["files"]) as reader:
            states = {
                name: _decoded(*_tree_of(name, data, together, name in training))
                for name in data["parts"]
                if name != _RANDOM
            }
            _check_named(training, states, folder)
            _load(training, states, reader)
            rest = {
                name: replace_leaves(state, _Stored, lambda leaf: reader.read(leaf.name).clone())
                for name, state in states.items()
                if name not in training
            }
            if random_states:
                _restore_random_states(data, together, reader)
    except (ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        if isinstance(error, SlopeError):
            raise
        raise CheckpointError(f"{folder / TREE} is damaged: {error!r:.200}.") from None
    return rest


def _check_hashes(
    folder: Path, manifest: Manifest, training: Mapping[str, Any], together: Together
) -> None:
    """Check the hashes of the files of the training state.

    If parameters are sharded, all ranks load their shards, and share the check.
    """
    stems = TREE, f"{STATES}-", f"{STATES}.safetensors"
    files = sorted(name for name in manifest.files if name.startswith(stems))
    parameters = (p for part in training.values() for p in _parameters(part))
    if together.world == 1 or not any(isinstance(p, DTensor) for p in parameters):
        check_hashes(folder, manifest, files)
        return
    with together.agreed():
        check_hashes(folder, manifest, files[together.rank :: together.world])


def read_tree(folder: Path) -> dict[str, Any]:
    """The content of ``training.json``, in the form of the present format."""
    data: dict[str, Any] = json.loads((folder / TREE).read_text())
    if _RANDOM not in data:
        return data
    # Before format 3, the file held one tree for each part, and all tensors were in one file.
    names = tensor_names(folder / f"{STATES}.safetensors")
    return {
        "world_size": 1,
        "parameters": {},
        "parts": {name: {"of": [0], "trees": [tree]} for name, tree in data.items()},
        "files": dict.fromkeys(names, f"{STATES}.safetensors"),
        "flat": True,
    }


def _tree_of(
    name: str, data: Mapping[str, Any], together: Together, is_object: bool
) -> tuple[str, Any]:
    """The prefix of the tensors' names and the tree of a part for this rank."""
    part, saved = data["parts"][name], data["world_size"]
    of, trees = part["of"], part["trees"]
    index = of[together.rank] if together.rank < saved else 0
    if len(trees) > 1 and together.world != saved:
        differs = (
            f"{name!r} was saved by {saved} ranks, on which it differed; now there are "
            f"{together.world}"
        )
        if is_object:
            raise CheckpointError(
                f"{differs}. Load it on {saved} ranks, or leave it out of training=. For a run "
                "that changes its number of ranks, save slope_fx.checkpoints.TrainingState with "
                "torch.distributed.checkpoint."
            )
        warnings.warn(
            f"{differs}. Rank {together.rank} gets that of rank {of.index(index)}.",
            TrainingWarning,
            stacklevel=users_stacklevel(),
        )
    prefix = "" if data.get("flat") else _stored_name(name, index, "")
    return prefix, trees[index]


def _decoded(prefix: str, tree: Any) -> Any:
    return decode(tree, lambda kind, inner: _Stored(prefix + inner, kind == SHARDED))


def _check_named(training: Mapping[str, Any], states: Mapping[str, Any], folder: Path) -> None:
    for name, part in training.items():
        if name not in states:
            raise CheckpointError(
                f"training has {name!r}, but {folder} was saved with {sorted(states)}."
            )
        if not hasattr(part, "load_state_dict"):
            raise CheckpointError(
                f"training[{name!r}] is a {type(part).__name__}, which has no load_state_dict. "
                "Plain data need not be named: it is returned."
            )


def _load(training: Mapping[str, Any], states: Mapping[str, Any], reader: TensorReader) -> None:
    """Load the state of all objects. If one object refuses its state, all are restored."""
    before = {name: _snapshot(part) for name, part in training.items()}
    for i, (name, part) in enumerate(training.items()):
        try:
            part.load_state_dict(_placed(states[name], part, reader))
        except Exception as error:
            for other in list(training)[: i + 1]:
                with contextlib.suppress(Exception):
                    training[other].load_state_dict(before[other])
            if isinstance(error, SlopeError):
                raise
            raise CheckpointError(
                f"training[{name!r}], a {type(part).__name__}, can't load the state that was "
                f"saved: {first_line(error)} Make it as the interrupted run did."
            ) from error


def _snapshot(part: Any) -> Any:
    # An optimizer replaces its state when it loads another one, so that no copy is needed.
    state = part.state_dict()
    return state if isinstance(part, Optimizer) else copy.deepcopy(state)


def _placed(state: Any, part: Any, reader: TensorReader) -> Any:
    """The state of a part with its tensors. An optimizer's are sharded like its parameters."""
    parameters = _parameters(part)
    if parameters and isinstance(state, dict) and isinstance(state.get("state"), dict):
        placed = {}
        for index, entry in state["state"].items():
            own = parameters[index] if type(index) is int and index < len(parameters) else None
            placed[index] = entry if own is None else _like(entry, own, reader)
        state = {**state, "state": placed}
    return replace_leaves(state, _Stored, lambda leaf: reader.read(leaf.name).clone())


def _like(entry: Any, parameter: Tensor, reader: TensorReader) -> Any:
    return replace_leaves(
        entry,
        _Stored,
        lambda leaf: reader.read_like(leaf.name, parameter, sharded=leaf.sharded),
    )


def _parameters(part: Any) -> list[Any]:
    """The parameters of an optimizer in the order of its state dict; [] for another object."""
    groups = getattr(part, "param_groups", None)
    if not isinstance(groups, list):
        return []
    return list(dict.fromkeys(p for group in groups for p in group["params"]))


def _restore_random_states(
    data: Mapping[str, Any], together: Together, reader: TensorReader
) -> None:
    if together.rank >= data["world_size"]:
        tell_of_new_rank(together.rank, data["world_size"])
        return
    part = data["parts"][_RANDOM]
    tree = part["trees"][part["of"][together.rank]]
    # They have tensors only before format 3, under the same names in the file.
    set_random_states(decode(tree, lambda _, inner: reader.read(inner).clone()))


def _state_of(part: Any) -> Any:
    has_state = hasattr(part, "state_dict") and not isinstance(part, type)
    return part.state_dict() if has_state else part
