"""Every error and warning of slope_fx: one class for each reaction of a caller.

``except slope_fx.errors.SlopeError`` catches all errors. Each message says what was given, what is
allowed and what to do. The classes also derive from the built-in error that a caller would expect
(``ValueError``, ``RuntimeError``).
"""

from slope_fx.kernels.errors import (
    ArgumentError,
    EngineWarning,
    SlopeError,
    SlopeWarning,
    UnsupportedError,
)


class NoEligibleLinearError(ArgumentError):
    """No linear of the model can be made sparse: train it dense, or change what is left dense."""


class StateError(SlopeError, RuntimeError):
    """The object isn't in a state for this call: a model that isn't compiled, or is already."""


class CheckpointError(SlopeError, ValueError):
    """A checkpoint isn't whole, isn't of this model, or can't be written: take another one."""


class ExpandedWeightError(SlopeError, RuntimeError):
    """With ``on_fallback="error"``: a sparse layer runs with its dense weight rebuilt."""


class ExpandedWeightWarning(SlopeWarning):
    """A sparse layer runs with its dense weight rebuilt: right, but slow, and single-pruned."""


class ArgumentWarning(SlopeWarning):
    """An argument has no effect, or the model needs another one to be treated as you expect."""


class TrainingWarning(SlopeWarning):
    """The training loop does not fit the model: an optimizer or a Schedule has to change."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, as a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") + "." if lines else "no message."


__all__ = [
    "ArgumentError",
    "ArgumentWarning",
    "CheckpointError",
    "EngineWarning",
    "ExpandedWeightError",
    "ExpandedWeightWarning",
    "NoEligibleLinearError",
    "SlopeError",
    "SlopeWarning",
    "StateError",
    "TrainingWarning",
    "UnsupportedError",
]
