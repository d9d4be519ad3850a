"""The errors and warnings of slope_fx: one class for each reaction of a caller.

``except slope_fx.errors.SlopeError`` catches all errors. Each message says what was given, what is
allowed and what to do. The error classes also derive from the matching built-in class
(``ValueError``, ``RuntimeError``).
"""

import sys

from slope_fx.kernels.errors import (
    ArgumentError,
    EngineWarning,
    SlopeError,
    SlopeWarning,
    UnsupportedError,
)


class NoEligibleLinearError(ArgumentError):
    """No linear of the model can be sparse. Train it dense, or change the options of pruning."""


class StateError(SlopeError, RuntimeError):
    """The object is in a wrong state for the call, such as a model that is already compiled."""


class CheckpointError(SlopeError, ValueError):
    """A checkpoint is damaged, does not fit the model, or cannot be written. Use another one."""


class ExpandedWeightError(SlopeError, RuntimeError):
    """A sparse layer runs with its dense weight rebuilt, and ``on_fallback`` is "error"."""


class ExpandedWeightWarning(SlopeWarning):
    """A sparse layer runs with its dense weight rebuilt: correct, but slow and single-pruned."""


class ArgumentWarning(SlopeWarning):
    """An argument has no effect, or the model needs another argument."""


class TrainingWarning(SlopeWarning):
    """The training loop does not fit the model. Change the optimizer or the Schedule."""


def users_stacklevel() -> int:
    """The ``stacklevel`` of the nearest frame outside of torch and slope_fx, for a warning."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "torch",
        "slope_fx",
    ):
        frame, level = frame.f_back, level + 1
    return level


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
