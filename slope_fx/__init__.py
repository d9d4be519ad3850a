"""slope_fx: a compiler for sparse pretraining with SLoPe (ICLR 2025, arXiv 2405.16325).

``model = slope_fx.compile(model, sparsity="2:4")``, a :class:`Schedule` beside the
learning-rate scheduler, and everything else stays as it was.
"""

from slope_fx import averaging, debug, ops
from slope_fx.backend import rewriting_backend
from slope_fx.checkpoints import (
    CheckpointReport,
    describe_checkpoint,
    load_pretrained,
    load_training,
    save_pretrained,
    verify,
)
from slope_fx.compiler import compile, sparse_weights, weights_changed
from slope_fx.densify import densify, export_peft
from slope_fx.errors import (
    ArgumentError,
    StateError,
    ArgumentWarning,
    CheckpointError,
    UnsupportedError,
    EngineWarning,
    ExpandedWeightError,
    ExpandedWeightWarning,
    NoEligibleLinearError,
    TrainingWarning,
    SlopeError,
    SlopeWarning,
)
from slope_fx.report.explain import Explanation, LinearReport, ProductReport, explain
from slope_fx.planning.patterns import Pattern
from slope_fx.report.preview import preview
from slope_fx.schedule import Schedule
from slope_fx.version import __version__
from slope_fx.sparse.weight import SparseWeight

__all__ = [
    "AdapterInitError",
    "AdapterRankError",
    "AlreadyCompiledError",
    "ArgumentError",
    "CalibrationError",
    "CalibrationWarning",
    "CheckpointError",
    "CheckpointReport",
    "DoubleBackwardError",
    "EngineError",
    "EngineWarning",
    "ExampleInputsError",
    "ExpandedWeightError",
    "ExpandedWeightWarning",
    "Explanation",
    "ExportError",
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
    "WeightWriteError",
    "__version__",
    "averaging",
    "compile",
    "debug",
    "densify",
    "describe_checkpoint",
    "explain",
    "export_peft",
    "load_pretrained",
    "load_training",
    "ops",
    "preview",
    "rewriting_backend",
    "save_pretrained",
    "sparse_weights",
    "verify",
    "weights_changed",
]
