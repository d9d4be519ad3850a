"""slope_fx: a compiler for sparse pretraining with SLoPe (ICLR 2025, arXiv 2405.16325).

``model = slope_fx.compile(model, sparsity="2:4")``, a :class:`Schedule` beside the
learning-rate scheduler, and everything else stays as it was.
"""

from slope_fx import debug, ops
from slope_fx.backend import rewriting_backend
from slope_fx.compiler import compile, sparse_weights, weights_changed
from slope_fx.errors import (
    AdapterRankError,
    AlreadyCompiledError,
    ArgumentError,
    EngineError,
    EngineWarning,
    ExampleInputsError,
    ExpandedWeightError,
    ExpandedWeightWarning,
    IgnoredArgumentWarning,
    MaskError,
    NoEligibleLinearError,
    NotCompiledError,
    PatternError,
    ScheduleError,
    ScheduleWarning,
    SlopeError,
    SlopeWarning,
    StaleOptimizerWarning,
    UntracedModelWarning,
)
from slope_fx.explain import Explanation, LinearReport, ProductReport, explain
from slope_fx.patterns import Pattern
from slope_fx.schedule import Schedule
from slope_fx.weights import SparseWeight

__version__ = "0.1.0"

__all__ = [
    "AdapterRankError",
    "AlreadyCompiledError",
    "ArgumentError",
    "EngineError",
    "EngineWarning",
    "ExampleInputsError",
    "ExpandedWeightError",
    "ExpandedWeightWarning",
    "Explanation",
    "IgnoredArgumentWarning",
    "LinearReport",
    "MaskError",
    "NoEligibleLinearError",
    "NotCompiledError",
    "Pattern",
    "PatternError",
    "ProductReport",
    "Schedule",
    "ScheduleError",
    "ScheduleWarning",
    "SlopeError",
    "SlopeWarning",
    "SparseWeight",
    "StaleOptimizerWarning",
    "UntracedModelWarning",
    "compile",
    "debug",
    "explain",
    "ops",
    "rewriting_backend",
    "sparse_weights",
    "weights_changed",
]
