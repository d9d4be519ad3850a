"""Every error and warning of slope_fx, each with what was given, what is allowed, what to do.

``except slope_fx.SlopeError`` catches them all. The classes also derive from the
built-in error a caller would expect (``ValueError``, ``RuntimeError``).
"""

from slope_fx.kernels.errors import DoubleBackwardError as DoubleBackwardError
from slope_fx.kernels.errors import EngineError as EngineError
from slope_fx.kernels.errors import EngineWarning as EngineWarning
from slope_fx.kernels.errors import ExportError as ExportError
from slope_fx.kernels.errors import SlopeError as SlopeError
from slope_fx.kernels.errors import SlopeWarning as SlopeWarning


class PatternError(SlopeError, ValueError):
    """A sparsity pattern, or the mapping of names to patterns, is not valid."""


class MaskError(SlopeError, ValueError):
    """A mask has the wrong type or shape, or isn't N:M."""


class AdapterRankError(SlopeError, ValueError):
    """``adapter_rank`` is not a rank that the layers can have."""


class AdapterInitError(SlopeError, ValueError):
    """What ``adapter_init`` gave, or was to start from, can't be an adapter."""


class CalibrationError(SlopeError, ValueError):
    """``calibration`` is missing, doesn't fit the model, or leaves a linear unseen."""


class CheckpointError(SlopeError, ValueError):
    """A checkpoint is not whole, not of this model, or can't be written."""


class ArgumentError(SlopeError, ValueError):
    """Another argument of a public function is not one of its allowed values."""


class ExampleInputsError(SlopeError, ValueError):
    """``example_inputs`` don't fit the model's forward."""


class NoEligibleLinearError(SlopeError, ValueError):
    """No linear of the model could be made sparse."""


class AlreadyCompiledError(SlopeError, RuntimeError):
    """``compile`` was called on a model that is compiled already."""


class NotCompiledError(SlopeError, ValueError):
    """A function that needs a compiled model was given another one."""


class ScheduleError(SlopeError, ValueError):
    """A Schedule has impossible steps, or was stepped past its end."""


class ExpandedWeightError(SlopeError, RuntimeError):
    """With ``on_fallback="error"``: a sparse weight is used where no pass can see it."""


class WeightWriteError(SlopeError, RuntimeError):
    """A write to ``weight`` of a sparse layer that can't be carried out on its values."""


class ExpandedWeightWarning(SlopeWarning):
    """A sparse layer runs with its dense weight rebuilt: right, but slow, and single-pruned."""


class CalibrationWarning(SlopeWarning):
    """Some experts of a mixture got no calibration input."""


class UntracedModelWarning(SlopeWarning):
    """The model could not be traced; its linears were found by module type."""


class IgnoredArgumentWarning(SlopeWarning):
    """An argument, or a part of one, has no effect."""


class StaleOptimizerWarning(SlopeWarning):
    """An optimizer made before ``compile`` holds weights that ``compile`` replaced."""


class ScheduleWarning(SlopeWarning):
    """A Schedule and the model it drives disagree."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, as a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") + "." if lines else "no message."
