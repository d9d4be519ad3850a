"""The record of a compiled model, and access to its sparse weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from slope_fx.backend.settings import Settings
from slope_fx.errors import StateError
from slope_fx.frozen.weight import UNFROZEN, FrozenWeight
from slope_fx.planning.config import SlopeConfig
from slope_fx.planning.plan import LinearPlan, SparsePlan
from slope_fx.planning.regions import Regions
from slope_fx.sparse.weight import SparseWeight

RECORD = "_slope_fx"
"""The attribute of a compiled model with its record."""


@dataclass(frozen=True)
class Frozen:
    """How a model was frozen.

    Attributes:
        values: the format of the values: "float", "int8" or "int4".
        group: the number of values that share a scale; 0 for "float".
    """

    values: str = "float"
    group: int = 0


@dataclass(frozen=True)
class Record:
    """The decisions of ``compile`` for a model.

    Attributes:
        config: configuration of the pruning.
        settings: settings of the run.
        plans: plans of the linears.
        untraced_because: the reason why the model was not traced; "" if it was traced.
        graphs: module path -> number of its graph, for modules with linears.
        regions: the compiled modules.
        frozen: how the model was frozen; None for a model that trains.
    """

    config: SlopeConfig
    settings: Settings
    plans: tuple[LinearPlan, ...]
    untraced_because: str = ""
    graphs: Mapping[str, int] = field(default_factory=dict)
    regions: Regions = field(default_factory=Regions)
    frozen: Frozen | None = None


def record_of(model: nn.Module) -> Record:
    """Returns the record of ``model``.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
    """
    record = getattr(model, "__dict__", {}).get(RECORD)
    if not isinstance(record, Record):
        raise StateError(
            f"model is a {type(model).__name__} that slope_fx.compile has not been called on. "
            "Pass the object that compile returned, not a part or a wrapper of it."
        )
    return record


def trainable_record_of(model: nn.Module) -> Record:
    """Returns the record of a model that can train.

    Raises:
        StateError: ``model`` is frozen, or not the object that ``compile`` returned.
    """
    record = record_of(model)
    if record.frozen is not None:
        raise StateError(f"model is a frozen {type(model).__name__}. {UNFROZEN}")
    return record


def compiled_models(module: nn.Module) -> list[nn.Module]:
    """The compiled models in ``module``, including ``module``."""
    return [m for m in module.modules() if isinstance(m.__dict__.get(RECORD), Record)]


def sparse_weights(model: nn.Module) -> dict[str, SparseWeight]:
    """Returns the sparse weights of a compiled model, by the qualified name of the layer.

    Of a frozen model, these are :class:`~slope_fx.frozen.FrozenWeight`, which can be read only.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
    """
    record_of(model)
    return sparse_weights_in(model)


def sparse_weights_in(module: nn.Module) -> dict[str, SparseWeight]:
    """The sparse weights in a module, by the qualified name of the layer. May be empty."""
    kinds = SparseWeight, FrozenWeight
    return {m.name: cast(SparseWeight, m) for m in module.modules() if isinstance(m, kinds)}


def sparsity_of(module: nn.Module) -> float:
    """The fraction of zeros in the weights of all linears of the compiled models in ``module``."""
    plans = [plan for model in compiled_models(module) for plan in record_of(model).plans]
    sizes = [
        (math.prod(p.shape), p.pattern.density if isinstance(p, SparsePlan) else 1.0) for p in plans
    ]
    return 1 - sum(size * kept for size, kept in sizes) / sum(size for size, _ in sizes)
