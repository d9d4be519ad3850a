"""Compile the regions of a model."""

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from slope_fx.backend.rewriting import backend_of
from slope_fx.backend.settings import Settings
from slope_fx.dynamo import compiled_call
from slope_fx.hub import cache_by_default, takes_cache
from slope_fx.planning.regions import Regions


def compile_regions(model: nn.Module, settings: Settings, regions: Regions, kind: Hashable) -> None:
    """Set the compiled calls of the regions of ``model``. Without a backend, nothing changes.

    Args:
        model: a model with installed sparse weights.
        settings: settings of the run.
        regions: the modules to compile.
        kind: identifies the model. Models with different kinds do not share compiled code.
    """
    if settings.backend is None:
        return
    backend = backend_of(settings)
    options: dict[str, Any] = {"dynamic": settings.dynamic, "fullgraph": settings.fullgraph}
    for number, module in regions.present(model):
        kinds = len(set(regions.kinds))
        call = compiled_call(module, backend, kind=(kind, number), kinds=kinds, **options)
        module._compiled_call_impl = call
    if settings.region == "auto" and not regions.whole:
        whole = compiled_call(model, backend, **options)
        model._compiled_call_impl = _in_blocks(model, whole)


def _in_blocks(model: nn.Module, whole: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the call of a model whose blocks are compiled one by one.

    In a transformers model with a cache of keys and values, each block has its own index in the
    cache, so the blocks would not share a graph. Training needs no cache, so the call disables it
    by default. If a cache is used, the call is ``whole``, the model as one graph.
    """
    signature, caches = inspect.signature(model.forward), takes_cache(model)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    def call(*args: Any, **kwargs: Any) -> Any:
        if caches:
            given = signature.bind_partial(*args, **kwargs).arguments
            given = {**given.get(rest, {}), **given}
            wanted = given.get("use_cache")
            cached = given.get("past_key_values") is not None
            trains = model.training and torch.is_grad_enabled()
            if wanted is None and trains and not cached:
                kwargs["use_cache"] = wanted = False
            if wanted is None:
                wanted = cache_by_default(model)
            if wanted or cached:
                return whole(*args, **kwargs)
        return model._call_impl(*args, **kwargs)

    return call
