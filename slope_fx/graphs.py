"""The graphs that were rewritten, kept so that each step can be shown afterwards.

``SLOPE_FX_GRAPHS=folder`` writes each graph's steps as it is compiled; ``explain(model,
graphs=True)`` those of one model, whenever asked.
"""

import copy
import itertools
import logging
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from slope_fx.passes import Context, PassReport, Recorder, run_passes
from slope_fx.weights import SparseWeight, find_alive

MOST_GRAPHS = 64
"""Kept of a model; a run with more recompiles than that has other troubles."""

log = logging.getLogger(__name__)
_numbers = itertools.count()


@dataclass(frozen=True)
class Seen:
    """A graph as it came to the passes, and what they were told."""

    gm: GraphModule
    context: Context
    disabled: tuple[str, ...]


_seen: "weakref.WeakKeyDictionary[SparseWeight, list[Seen]]" = weakref.WeakKeyDictionary()


def remember(
    gm: GraphModule, context: Context, disabled: tuple[str, ...], example_inputs: Sequence[Any]
) -> None:
    """Keep a copy of a graph for as long as the model lives that it is of."""
    inputs = {id(t) for t in example_inputs if isinstance(t, Tensor)}
    owners = find_alive(lambda weight: id(weight.values) in inputs)
    if not owners or any(True for _ in gm.parameters()):
        return  # it holds the parameters themselves, which a copy would hold twice
    try:
        copied = copy.deepcopy(gm)
    except Exception:
        log.info("a graph can't be copied, so its passes can't be shown later", exc_info=True)
        return
    graphs = _seen.setdefault(min(owners, key=lambda weight: weight.name), [])
    graphs.append(Seen(copied, context, disabled))
    del graphs[:-MOST_GRAPHS]


def environment_recorder() -> Recorder | None:
    """What writes the next graph's steps, if ``SLOPE_FX_GRAPHS`` names a folder."""
    folder = os.environ.get("SLOPE_FX_GRAPHS", "").strip()
    return Recorder(Path(folder) / f"graph_{next(_numbers):03d}") if folder else None


def write_graphs(model: nn.Module, folder: Path) -> list[tuple[str, tuple[PassReport, ...]]]:
    """Run the passes again over each graph of ``model``, and write down each step.

    Returns:
        For each graph its folder's name, and what each pass did.
    """
    weights = [module for module in model.modules() if isinstance(module, SparseWeight)]
    graphs = [seen for weight in weights for seen in _seen.get(weight, [])]
    written = []
    for number, seen in enumerate(graphs):
        name = f"graph_{number:03d}_{'training' if seen.context.training else 'inference'}"
        gm = copy.deepcopy(seen.gm)
        rewrites = run_passes(gm, seen.context, seen.disabled, Recorder(folder / name))
        written.append((name, rewrites.reports))
    return written
