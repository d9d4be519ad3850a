"""``TrainingState``: a compiled model and its run, for ``torch.distributed.checkpoint``."""

import copy
import json
import tempfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from slope_fx.checkpoints.filling import check_same_layers, note_loaded
from slope_fx.checkpoints.holders import choose_holders, describe_copies, prints_of_shards
from slope_fx.checkpoints.manifest import Manifest
from slope_fx.checkpoints.randoms import random_states, set_random_states, tell_of_new_rank
from slope_fx.checkpoints.saving import describe_together, named_tensors, write_configuration
from slope_fx.checkpoints.together import Together
from slope_fx.checkpoints.trees import decode_inline, encode_inline
from slope_fx.checkpoints.unstored import make_unstored_buffers
from slope_fx.errors import ArgumentError, CheckpointError, first_line
from slope_fx.record import sparse_weights, trainable_record_of
from slope_fx.schedule import Schedule

DCP_MODEL, DCP_OPTIMIZER, DCP_REST = "model", "optimizer", "slope_fx"


class TrainingState(Stateful):
    """All of a run in one object for ``save``, ``load`` and ``async_save`` of DCP.

    It can be loaded by another number of ranks than it was saved by, sharded in another way, and
    in either phase: the Schedule's phase is restored. ::

        state = slope_fx.checkpoints.TrainingState(model, optimizer, schedule, rates=rates)
        torch.distributed.checkpoint.save({"training": state}, checkpoint_id=path)
        torch.distributed.checkpoint.load({"training": state}, checkpoint_id=path)

    ``slope-fx convert`` makes a checkpoint of :func:`slope_fx.save_pretrained` of what is saved
    under the name "training", and back.

    Args:
        model: the object that ``compile`` or ``load_pretrained`` returned, sharded or not.
        optimizers: the optimizer of the model, or several.
        schedule: the Schedule of the model.
        more: other objects with a ``state_dict`` and a ``load_state_dict``, such as a
            learning-rate scheduler. Their states may hold what ``save_pretrained`` stores of them.
            If a state differs between ranks, as that of a data loader may, each rank gets its own.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned, or is frozen.
        ArgumentError: ``schedule`` is no Schedule, or another object has no ``state_dict`` or no
            ``load_state_dict``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer] = (),
        schedule: Schedule | None = None,
        **more: Any,
    ) -> None:
        trainable_record_of(model)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ArgumentError(
                f"schedule is a {type(schedule).__name__}; it must be a slope_fx.Schedule. Give "
                "other objects by a name, such as rates=lr_scheduler."
            )
        self._model = model
        self._optimizers = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
        self._parts = {**({} if schedule is None else {"schedule": schedule}), **more}
        for name, part in self._parts.items():
            if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
                raise ArgumentError(
                    f"{name} is a {type(part).__name__}; it must have a state_dict and a "
                    "load_state_dict."
                )

    def state_dict(self) -> dict[str, Any]:
        """The state: tensors of the model and the optimizers by name, and one string of the rest.

        Its structure is the same in both phases. An idle adapter gets a state of zeros, which
        loading drops again. A collective operation.

        Raises:
            CheckpointError: a state cannot be stored without pickle, or ranks hold different
                contents of a tensor and which is right is unknown.
        """
        together = Together()
        with together.agreed():
            named, aliases = named_tensors(self._model)
            trees = {
                name: encode_inline(part.state_dict(), name) for name, part in self._parts.items()
            }
            trees["random_states"] = encode_inline(random_states(), "random_states")
            manifest_files = _configuration(self._model)
            shards = prints_of_shards(named, together.world)
        prints = together.gather(shards)
        with together.agreed():
            copies = describe_copies(named, aliases, prints)
        stale = _stale(together, copies, named)
        model = {
            name: value
            for name, value in get_model_state_dict(self._model).items()
            if name not in stale
        }
        states, groups, without = self._optimizer_states(together, named)
        rest = {
            "world_size": together.world,
            "manifest": describe_together(together, self._model).to_dict(),
            "aliases": aliases,
            "files": manifest_files,
            "without_state": without,
            "groups": groups,
            "parts": {name: _shared(together, tree) for name, tree in trees.items()},
        }
        return {DCP_MODEL: model, DCP_OPTIMIZER: states, DCP_REST: json.dumps(rest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the model, the optimizers, the Schedule and its phase, and the random states.

        Raises:
            CheckpointError: the state is of another model, or an object refuses its state.
        """
        together = Together()
        try:
            rest = json.loads(state_dict[DCP_REST])
            saved = Manifest.from_dict(rest["manifest"], "the state")
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the state isn't one of a TrainingState: {error!r}.") from None
        check_same_layers(self._model, saved)
        if missing := set(rest["parts"]) - {"random_states"} ^ set(self._parts):
            raise CheckpointError(
                f"the state was saved with {sorted(set(rest['parts']) - {'random_states'})}, and "
                f"this TrainingState has {sorted(self._parts)}: {min(missing)} differs."
            )
        make_unstored_buffers(self._model)
        strict = StateDictOptions(strict=not _is_partial(self._model, state_dict[DCP_MODEL]))
        set_model_state_dict(self._model, state_dict[DCP_MODEL], options=strict)
        self._load_optimizers(state_dict[DCP_OPTIMIZER], rest)
        for name, part in self._parts.items():
            tree = _own(name, rest, together)
            try:
                part.load_state_dict(decode_inline(tree))
            except Exception as error:
                raise CheckpointError(
                    f"{name}, a {type(part).__name__}, can't load the state that was saved: "
                    f"{first_line(error)} Make it as the interrupted run did."
                ) from error
        for weight in sparse_weights(self._model).values():
            note_loaded(weight)
        if "random_states" not in rest["parts"]:
            return  # converted from a checkpoint of a model alone
        if together.rank < rest["world_size"]:
            set_random_states(decode_inline(_own("random_states", rest, together)))
        else:
            tell_of_new_rank(together.rank, rest["world_size"])

    def _optimizer_states(
        self, together: Together, named: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], list[Any], list[str]]:
        """The optimizers' states and groups by parameter name; and the names without a state."""
        if not self._optimizers:
            return {}, [], []
        name_of = {id(tensor): name for name, tensor in named.items()}
        with _filled(self._optimizers) as filled:
            found: Any = get_optimizer_state_dict(self._model, self._optimizers)
        states = dict(found["state"])
        empty = {name_of[id(parameter)] for parameter in filled}
        having, _ = together.distinct(sorted(set(states) - empty))
        have = {name for names in having for name in names}
        # Another rank of a pipeline has the state of what it trains.
        states = {name: s for name, s in states.items() if name not in empty or name not in have}
        groups, at = [], 0
        for optimizer in self._optimizers:
            own = found["param_groups"][at : at + len(optimizer.param_groups)]
            at += len(own)
            groups.append(encode_inline(list(own), "param_groups"))
        different, _ = together.distinct(groups)
        missing, _ = together.distinct(sorted(empty - have))
        return states, different, sorted({name for names in missing for name in names})

    def _load_optimizers(self, states: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
        if not self._optimizers:
            return
        groups = [group for rank in rest["groups"] for own in rank for group in decode_inline(own)]
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    # With an entry, torch doesn't take a step to initialize the state.
                    optimizer.state[parameter]
        set_optimizer_state_dict(
            self._model, self._optimizers, {"state": dict(states), "param_groups": groups},
            options=StateDictOptions(strict=False),
        )  # fmt: skip
        named, _ = named_tensors(self._model)
        for name in rest["without_state"]:
            for optimizer in self._optimizers:
                if name in named:
                    optimizer.state.pop(named[name], None)


@contextmanager
def _filled(optimizers: Sequence[Optimizer]) -> Iterator[list[Tensor]]:
    """Gives all trainable parameters a state within a ``with`` block: those that have none, zeros.

    ``get_optimizer_state_dict`` alone would take a step of the optimizer if it has no state.
    """
    before = [dict(optimizer.state) for optimizer in optimizers]
    filled: list[Tensor] = []
    try:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                empty = [
                    p for p in group["params"] if p.requires_grad and not optimizer.state.get(p)
                ]
                for parameter, state in zip(
                    empty, _first_states(optimizer, group, empty), strict=True
                ):
                    optimizer.state[parameter] = state
                filled += empty
        yield filled
    finally:
        for optimizer, earlier in zip(optimizers, before, strict=True):
            optimizer.state.clear()
            optimizer.state.update(earlier)


def _first_states(
    optimizer: Optimizer, group: Mapping[str, Any], parameters: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """The states that ``optimizer`` would make for parameters, from zeros in their places."""
    if not parameters:
        return []
    twins = [torch.zeros_like(p, requires_grad=False).requires_grad_() for p in parameters]
    for twin in twins:
        twin.grad = torch.zeros_like(twin)
    scratch = copy.copy(optimizer)
    # A learning-rate scheduler puts a `step` of the original into the attributes.
    own = {k: v for k, v in optimizer.__dict__.items() if k != "step" and "hooks" not in k}
    scratch.__dict__.update(own)
    scratch.__dict__.pop("step", None)
    scratch._optimizer_step_pre_hooks = OrderedDict()
    scratch._optimizer_step_post_hooks = OrderedDict()
    scratch.state = defaultdict(dict)
    options = copy.deepcopy({k: v for k, v in group.items() if k != "params"})
    if "train_mode" in options:  # of a schedule-free optimizer, which is saved in its other mode
        options["train_mode"] = True
    scratch.param_groups = [{**options, "params": twins}]
    type(optimizer).step(scratch)
    return [dict(scratch.state.get(twin, {})) for twin in twins]


def _configuration(model: nn.Module) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        write_configuration(Path(folder), model, None)
        return {file.name: file.read_text() for file in sorted(Path(folder).iterdir())}


def _stale(together: Together, copies: list[list[Any]], named: Mapping[str, Tensor]) -> set[str]:
    """The names of the tensors that other ranks hold in a newer state.

    Raises:
        CheckpointError: which is right is unknown. Before any training this raises no error,
            because loading asks for the state too, and then replaces all of it.
    """
    try:
        chosen = choose_holders(together, copies)
    except CheckpointError:
        if any(any(trained for *_, trained in held) for held in together.gather(copies)):
            raise
        return set()
    return {
        name
        for c in chosen
        if together.rank not in c.ranks
        for name in (c.name, *c.aliases)
        if name in named
    }


def _shared(together: Together, tree: Any) -> dict[str, Any]:
    trees, of = together.distinct(tree)
    return {"of": of, "trees": trees}


def _own(name: str, rest: Mapping[str, Any], together: Together) -> Any:
    """The tree of a part for this rank."""
    part, saved = rest["parts"][name], rest["world_size"]
    if len(part["trees"]) > 1 and name != "random_states" and saved != together.world:
        raise CheckpointError(
            f"{name!r} was saved by {saved} ranks, on which it differed; now there are "
            f"{together.world}. Load it on {saved} ranks, or without {name}."
        )
    return part["trees"][part["of"][together.rank] if together.rank < saved else 0]


def _is_partial(model: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether the state leaves out tensors that other ranks hold in a newer state."""
    return any(name not in state for name in model.state_dict(keep_vars=True))
