"""Finds out whether code runs for torch.distributed.pipelining."""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from slope_fx.errors import UnsupportedError

_PACKAGE = "torch.distributed.pipelining"


def running_stage() -> Any:
    """The stage of a pipeline (``PipelineStage``) that calls this function, or None."""
    for frame in _frames(f"{_PACKAGE}.stage"):
        stage = frame.f_locals.get("self")
        if hasattr(stage, "submod") and hasattr(stage, "num_stages"):
            return stage
    return None


def refuse_tracer(name: str) -> None:
    """Refuse ``pipeline(model, ...)``, which splits the graph of torch.export.

    The graph has no idle adapters, and its stages are not models that ``compile`` returned.

    Args:
        name: of a layer.

    Raises:
        UnsupportedError: ``pipeline`` calls this function.
    """
    if next(_frames(f"{_PACKAGE}._IR"), None) is not None:
        raise UnsupportedError(
            f"{name}: torch.distributed.pipelining.pipeline can't split a model with sparse "
            "weights. Split the dense model and compile each stage: "
            "slope_fx.compile(pipe.get_stage_module(i), example_inputs=..., skip_first=i == 0, "
            "skip_head=i == pipe.num_stages - 1). Or split the compiled model by hand and make "
            "a PipelineStage of each part."
        )


def _frames(module: str) -> Iterator[FrameType]:
    """The frames on the stack that run code of ``module``, the innermost first."""
    if module not in sys.modules:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            yield frame
        frame = frame.f_back
