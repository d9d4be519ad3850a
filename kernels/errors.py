"""The base of all errors and warnings of slope_fx, and those of engines and ops.

They are defined here because kernels/ imports nothing from the other folders. ``slope_fx.errors``
has all errors.
"""


class SlopeError(Exception):
    """Base of all errors that slope_fx raises."""


class EngineError(SlopeError, ValueError):
    """An argument or an environment variable names an unknown engine or has another wrong value."""


class SlopeWarning(UserWarning):
    """Base of all warnings that slope_fx issues."""


class EngineWarning(SlopeWarning):
    """An engine cannot run here, or does not support the tensors. Another engine is used."""


class ExportError(SlopeError, ValueError):
    """A model cannot be exported to another format."""


class DoubleBackwardError(SlopeError, RuntimeError):
    """The code computes a second derivative (``create_graph=True``) of a sparse linear."""
