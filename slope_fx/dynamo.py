"""A module's call, compiled by Dynamo with limits and code of its own."""

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
"""Dynamo's own limit of 8 is soon reached by one block's code in two phases, training and
evaluating, with and without a cache; past it a sparse layer runs expanded."""

VARIANTS = 8
"""In how many circumstances each graph may be met: phases, training and not, autocast, shapes."""


def compiled_call(
    module: nn.Module,
    backend: BackendFunction,
    *,
    kind: Hashable = 0,
    kinds: int = 1,
    **options: Any,
) -> Callable[..., Any]:
    """The call of ``module``, compiled by ``backend``.

    Args:
        module: the module.
        backend: what compiles its graphs.
        kind: equal for modules that share compiled code, as those of equal graphs do.
        kinds: how many such graphs there are. Each may be recompiled in each of the variants
            (phase, training, autocast) that a run may meet.
        options: of torch.compile.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # torch 2.13 has it
        limit = torch._dynamo.config.recompile_limit
        options["recompile_limit"] = max(limit, RECOMPILE_LIMIT, VARIANTS * kinds)
    call: Callable[..., Any] = module._call_impl
    if type(module).__module__.startswith("torch.nn."):
        # Dynamo steps over the frames of torch's own modules and would leave an
        # nn.Sequential or nn.Linear uncompiled, so it is given a frame of ours.
        call = _framed(call, kind)
    compiled: Callable[..., Any] = torch.compile(call, backend=backend, **options)
    return compiled


def _framed(call: Callable[..., Any], kind: Hashable) -> Callable[..., Any]:
    def framed(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    # Dynamo counts recompiles by code: each kind has its own, so that none uses up the limit of
    # another.
    framed.__code__ = _code_of(framed.__code__, kind)
    return framed


@functools.cache
def _code_of(code: CodeType, kind: Hashable) -> CodeType:
    return code.replace(co_name=f"framed_{hash(kind) & 0xFFFFFFFF:x}")
