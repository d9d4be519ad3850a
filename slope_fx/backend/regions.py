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
    if regions.whole:
        model._compiled_call_impl = _without_cache(model, call, call)
    elif settings.region == "auto":
        whole = compiled_call(model, backend, **options)
        model._compiled_call_impl = _without_cache(model, model._call_impl, whole)


def _without_cache(
    model: nn.Module, call_blocks: Callable[..., Any], whole: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns the call of a model, which uses no cache of keys and values in training by default.

    Training needs no cache. In a transformers model, each block has its own index in the cache, so
    blocks that are compiled one by one would not share a graph. And Dynamo doesn't compile a block
    in a ``checkpoint_wrapper`` that writes to a cache.

    Args:
        model: the model.
        call_blocks: the call without a cache.
        whole: the call with a cache: the model as one graph.
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
        return call_blocks(*args, **kwargs)

    return call
