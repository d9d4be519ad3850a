"""Attach the record and the compiled regions to a model with sparse weights, and detach them."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from slope_fx.backend.regions import compile_regions
from slope_fx.backend.settings import Settings
from slope_fx.frozen.calls import guard_calls
from slope_fx.planning.config import SlopeConfig
from slope_fx.planning.plan import LinearPlan
from slope_fx.planning.regions import Regions, choose_regions
from slope_fx.record import RECORD, Frozen, Record, record_of
from slope_fx.sparse.install import restore, set_kind
from slope_fx.sparse.optimizers import watch
from slope_fx.stages import watch_stages

_MODELS = "transformers.modeling_utils"


def make_record(
    model: nn.Module,
    config: SlopeConfig,
    settings: Settings,
    plans: Sequence[LinearPlan],
    untraced_because: str,
    graphs: Mapping[str, int],
) -> Record:
    """Returns the record of a model, with the chosen regions. The model does not change.

    Args:
        model: the model.
        config, settings, plans, untraced_because: as in :class:`Record`.
        graphs: module path -> number of its graph, for all modules of the traced model.
    """
    regions = Regions()
    if settings.backend is not None:
        regions = choose_regions(model, settings.region, plans, graphs)
    scopes = {scope for plan in plans for scope in plan.scopes}
    holding = {scope[:end] for scope in scopes for end in _ends(scope)}
    of_interest = {path: number for path, number in graphs.items() if path in holding}
    return Record(config, settings, tuple(plans), untraced_because, of_interest, regions)


def _ends(path: str) -> list[int]:
    return [i for i, letter in enumerate(path) if letter == "."] + [len(path)]


def attach(model: nn.Module, record: Record, undo: ExitStack) -> None:
    """Attach ``record`` to ``model``, and compile its regions.

    Args:
        model: a model with installed sparse weights, changed in place.
        record: the record.
        undo: receives callbacks that restore the model.
    """
    undo.callback(restore, model, type(model), dict(model.__dict__))
    model.__dict__[RECORD] = record
    of_transformers = any(c.__module__ == _MODELS for c in type(model).__mro__)
    save = _save_pretrained if of_transformers else None
    set_kind(model, after_copy=_compile, save_pretrained=save)
    _compile(model)


def attach_frozen(model: nn.Module, record: Record, frozen: Frozen) -> None:
    """Attach the record of a frozen model, and compile the model."""
    regions = record.regions if record.settings.region == "blocks" else Regions()
    with ExitStack() as undo:
        attach(model, dataclasses.replace(record, regions=regions, frozen=frozen), undo)
        undo.pop_all()


def _save_pretrained(model: nn.Module, save_directory: Any, *args: Any, **options: Any) -> None:
    """As the method of transformers. It writes a checkpoint of slope_fx."""
    from slope_fx.checkpoints.saving import save_by_transformers  # which imports this module

    save_by_transformers(model, save_directory, *args, **options)


def _compile(model: nn.Module) -> None:
    record = record_of(model)
    compile_regions(model, record.settings, record.regions, kind=record.plans)
    if record.frozen is not None:
        guard_calls(model)
    watch()
    watch_stages()


def detach(model: nn.Module) -> None:
    """Undo :func:`attach` on a model whose weights are dense again."""
    record: Record = model.__dict__.pop(RECORD)
    for _, module in record.regions.present(model):
        module._compiled_call_impl = None
    model._compiled_call_impl = None
