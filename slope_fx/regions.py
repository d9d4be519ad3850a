"""Which modules are compiled, each as one graph: the whole model, or its repeated blocks."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

Region = Literal["auto", "model", "blocks"]


def choose_regions(model: nn.Module, region: Region, scopes: Iterable[str]) -> list[str]:
    """Paths of the modules to compile, "" for the model itself.

    Args:
        model: the model.
        region: "model" for one graph; "blocks" for the repeated blocks, compiled one by
            one (the same code serves them all), and for each sparse linear outside of
            them the module that calls it. "auto": the blocks, where there are any.
        scopes: paths of the modules whose forward calls a sparse linear.
    """
    if region == "model":
        return [""]
    blocks = _repeated_blocks(model)
    chosen = set()
    for scope in scopes:
        containing = [b for b in blocks if scope == b or scope.startswith(f"{b}.")]
        chosen.add(min(containing, key=len) if containing else scope)
    inside = {c for c in chosen if any(o == "" or c.startswith(f"{o}.") for o in chosen if o != c)}
    chosen -= inside
    if region == "auto" and len(chosen & blocks) < 2:
        return [""]
    return sorted(chosen)


def in_blocks(model: nn.Module, whole: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a model whose blocks are compiled one by one.

    A transformers model with a cache of keys and values is another matter: each block has its
    own place there, which would make each a graph of its own. Training needs no cache, so none
    is made unless it is asked for; where one is used, ``whole`` is called instead.
    """
    signature, caches = inspect.signature(model.forward), may_cache(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        if caches:
            given = signature.bind_partial(*args, **kwargs).arguments
            wanted = given.get("use_cache")
            cached = given.get("past_key_values") is not None
            trains = model.training and torch.is_grad_enabled()
            if wanted is None and trains and not cached:
                kwargs["use_cache"] = wanted = False
            if wanted is None:
                wanted = getattr(model.config, "use_cache", False)
            if wanted or cached:
                return whole(*args, **kwargs)
        return model._call_impl(*args, **kwargs)

    return call


def may_cache(model: nn.Module) -> bool:
    """Whether ``model`` may keep keys and values, as a language model of transformers does."""
    return hasattr(model, "config") and "use_cache" in inspect.signature(model.forward).parameters


def _repeated_blocks(model: nn.Module) -> set[str]:
    """Members of a ModuleList that holds two or more modules of one class."""
    blocks = set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if len({type(block) for block in module}) == 1:
            blocks |= {f"{path}.{i}" if path else str(i) for i in range(len(module))}
    return blocks
