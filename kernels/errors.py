"""The base of all errors and warnings of slope_fx, and those that engines and ops raise.

They live here because kernels import nothing from above; ``slope_fx.errors`` has the rest.
"""


class SlopeError(Exception):
    """Base of all errors that slope_fx raises."""


class EngineError(SlopeError, ValueError):
    """An engine was named, by argument or environment, that doesn't exist."""


class SlopeWarning(UserWarning):
    """Base of all warnings that slope_fx issues."""


class EngineWarning(SlopeWarning):
    """An engine can't serve here, or not these tensors; another one does."""


class ExportError(SlopeError, ValueError):
    """A model can't be written in another format."""


class DoubleBackwardError(SlopeError, RuntimeError):
    """A gradient of a gradient (``create_graph=True``) was asked of a sparse linear."""
