"""Makes a model whose sparse weights are installed a compiled model, and undoes that."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from torch import nn

from slope_fx.backend.regions import compile_regions
from slope_fx.backend.rewriting import backend_of
from slope_fx.backend.settings import Settings
from slope_fx.planning.config import SlopeConfig
from slope_fx.planning.plan import LinearPlan
from slope_fx.planning.regions import Regions, choose_regions
from slope_fx.record import RECORD, Record, record_of, sparse_weights_in
from slope_fx.sparse.install import restore, set_kind


def make_record(
    model: nn.Module,
    config: SlopeConfig,
    settings: Settings,
    plans: Sequence[LinearPlan],
    untraced_because: str,
    graphs: Mapping[str, int],
) -> Record:
    """The record of a model, with the regions chosen. Changes nothing.

    Args:
        model: to be compiled.
        config, settings, plans, untraced_because: as of :class:`Record`.
        graphs: the number of the graph of each module of the traced model.
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
    """Make ``model``, whose weights are installed, carry ``record``, and compile its regions.

    Args:
        model: changed in place.
        record: what was decided.
        undo: gets what it takes to put the model back as it was.
    """
    undo.callback(restore, model, type(model), dict(model.__dict__))
    model.__dict__[RECORD] = record
    set_kind(model, after_copy=_compile)
    _compile(model)


def _compile(model: nn.Module) -> None:
    record = record_of(model)
    compile_regions(model, record.settings, record.regions, kind=record.plans)
    if record.settings.backend is not None:
        for weight in sparse_weights_in(model).values():
            weight.note_choices(backend_of(record.settings).choices)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach` on a model whose weights are dense again."""
    record: Record = model.__dict__.pop(RECORD)
    for path in {"", *record.regions.paths}:
        model.get_submodule(path)._compiled_call_impl = None
