"""Compiled graphs that report, when they run for a model, which engines they were compiled with."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from slope_fx.dynamo import CompiledFunction
from slope_fx.sparse.blank import check_filled
from slope_fx.sparse.parts import Choices
from slope_fx.sparse.weight import find_alive
from slope_fx.sparse.wrappers import check_wrapper

_numbers = itertools.count()

first_runs: list[Callable[[], None]] = []
"""Called when a compiled graph first runs for a layer."""


def noting(compiled: CompiledFunction, chosen: Mapping[int, Choices]) -> CompiledFunction:
    """``compiled``, which notes its engines on the layers at its first run for each layer.

    Dynamo runs one compiled graph for all layers, and all models, that are alike. So what a layer
    runs with is known only when it runs.

    Args:
        compiled: the compiled graph.
        chosen: the engines of the products, by the place of the layer's forward mask among the
            inputs.

    Raises:
        StateError: by the result, in a DistributedDataParallel that was made before ``compile``,
            or for a layer without content.
    """
    if not chosen:
        return compiled
    number, first = next(_numbers), next(iter(chosen))

    def run(*inputs: Any) -> Any:
        seen = inputs[first].__dict__.setdefault("_slope_seen", set())
        key = number, id(DistributedDataParallel._active_ddp_module)
        if key not in seen:
            _note(inputs, chosen)
            seen.add(key)
        return compiled(*inputs)

    return run


def _note(inputs: tuple[Any, ...], chosen: Mapping[int, Choices]) -> None:
    places = {id(inputs[place]): choices for place, choices in chosen.items()}
    for weight in find_alive(lambda weight: id(weight.forward_bits) in places):
        check_filled(weight)
        weight.choices.update(places[id(weight.forward_bits)])
        check_wrapper(weight.name, weight.values)
    for check in first_runs:
        check()
