"""Compile the call of a module with Dynamo."""

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

CompiledFunction = Callable[..., Any]
BackendFunction = Callable[[GraphModule, Sequence[Any]], CompiledFunction]

RECOMPILE_LIMIT = 32
"""Dynamo's default limit of 8 is too low for the code of a block, which is compiled for two
phases, training and evaluation, with and without a cache. Beyond the limit a sparse layer runs
expanded."""

VARIANTS = 8
"""The number of variants of each graph: phases, training or not, autocast, shapes."""


def compiled_call(
    module: nn.Module,
    backend: BackendFunction,
    *,
    kind: Hashable = 0,
    kinds: int = 1,
    **options: Any,
) -> Callable[..., Any]:
    """Returns the call of ``module``, compiled with ``backend``.

    Args:
        module: the module.
        backend: compiles the graphs of the module.
        kind: equal for modules that share compiled code, such as modules with equal graphs.
        kinds: number of different graphs. Each may be recompiled in all variants (phase,
            training, autocast, shapes).
        options: options of torch.compile.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # since torch 2.13
        limit = torch._dynamo.config.recompile_limit
        options["recompile_limit"] = max(limit, RECOMPILE_LIMIT, VARIANTS * kinds)
    call: Callable[..., Any] = module._call_impl
    if type(module).__module__.startswith("torch.nn."):
        # Dynamo skips the frames of torch's modules, so an nn.Sequential or nn.Linear would not be
        # compiled. A frame of slope_fx is not skipped.
        call = _framed(call, kind)
    compiled: Callable[..., Any] = torch.compile(call, backend=backend, **options)
    return compiled


def _framed(call: Callable[..., Any], kind: Hashable) -> Callable[..., Any]:
    def framed(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    # Dynamo counts recompiles per code object, so each kind has a separate code object and limit.
    framed.__code__ = _code_of(framed.__code__, kind)
    return framed


@functools.cache
def _code_of(code: CodeType, kind: Hashable) -> CodeType:
    return code.replace(co_name=f"framed_{hash(kind) & 0xFFFFFFFF:x}")
