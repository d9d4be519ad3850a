"""The base of all errors and warnings of slope_fx, and those that engines and ops raise.

They live here because kernels import nothing from above; ``slope_fx.errors`` has the rest.
"""


class SlopeError(Exception):
    """Base of all errors that slope_fx raises."""


class ArgumentError(SlopeError, ValueError):
    """An argument, or an environment variable, has a value that isn't allowed: change the call."""


class UnsupportedError(SlopeError, RuntimeError):
    """Sparse weights can't do this: make the model, or the layer, dense for it."""


class SlopeWarning(UserWarning):
    """Base of all warnings that slope_fx issues."""


class EngineWarning(SlopeWarning):
    """An engine can't serve here, or gains nothing: look at the speed."""
