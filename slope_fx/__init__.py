"""slope_fx: a compiler for sparse pretraining with SLoPe (ICLR 2025, arXiv 2405.16325).

Call ``model = slope_fx.compile(model, sparsity="2:4")``, and step a :class:`Schedule` with the
learning-rate scheduler. The rest of the training loop does not change.
"""

from slope_fx import debug, errors, methods, ops
from slope_fx.backend import rewriting_backend
from slope_fx.checkpoints import load_pretrained, load_training, save_pretrained
from slope_fx.compiler import compile
from slope_fx.compress import compress_
from slope_fx.densify import densify
from slope_fx.frozen.freeze import freeze
from slope_fx.frozen.package import package
from slope_fx.frozen.warm import warm_up
from slope_fx.groups import param_groups
from slope_fx.integrations.opening import register_with_transformers
from slope_fx.integrations.peft import export_peft
from slope_fx.planning import SlopeConfig
from slope_fx.record import sparse_weights
from slope_fx.report import explain, preview
from slope_fx.schedule import Schedule
from slope_fx.sparse import averaging as averaging
from slope_fx.sparse import parallel as parallel
from slope_fx.version import __version__

__all__ = [
    "Schedule",
    "SlopeConfig",
    "__version__",
    "compile",
    "compress_",
    "debug",
    "densify",
    "errors",
    "explain",
    "export_peft",
    "freeze",
    "load_pretrained",
    "load_training",
    "methods",
    "ops",
    "package",
    "param_groups",
    "preview",
    "rewriting_backend",
    "save_pretrained",
    "sparse_weights",
    "warm_up",
]


register_with_transformers()


def __dir__() -> list[str]:
    return __all__
