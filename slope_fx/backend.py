"""The torch.compile backend that runs the passes and hands the graph on."""

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.fx import GraphModule, Node

from slope_fx.errors import ArgumentError, EngineError, EngineWarning, ExpandedWeightError
from slope_fx.kernels import selection
from slope_fx.kernels.engines import AUTO, ENGINES, allowed_engines
from slope_fx.passes import Context, Leftover, run_passes
from slope_fx.passes.graph import nested_calls
from slope_fx.weights import find_alive

RECOMPILE_LIMIT = 32
"""Dynamo's own limit of 8 is soon reached by one block's code in two phases, training and
evaluating, with and without a cache; past it a sparse layer runs expanded."""

log = logging.getLogger(__name__)

CompiledFunction = Callable[..., Any]
BackendFunction = Callable[[GraphModule, Sequence[Any]], CompiledFunction]


class RewritingBackend:
    """Rewrites a Dynamo graph with the passes, then compiles it with another backend.

    Get one from :func:`rewriting_backend`: Dynamo keeps its compiled code by the identity
    of the backend, so there must be one object for each inner backend.
    """

    def __init__(self, inner: str | BackendFunction, engine: str = AUTO) -> None:
        self.inner = inner
        self.engine = engine
        self.graphs = 0
        """Graphs compiled so far, recompiles included."""
        self._told: set[frozenset[tuple[int, int, int, int]]] = set()

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> CompiledFunction:
        self.graphs += 1
        rewrites = run_passes(gm, Context.here(self.engine))
        try:
            for leftover in rewrites.leftovers:
                _report(gm, leftover, example_inputs)
        except ExpandedWeightError as error:
            # Raised from here it would reach the user wrapped in Dynamo's own error.
            return _raiser(error)
        self._tell_if_nothing_gains(rewrites.weights)
        compiled: CompiledFunction = _resolve(self.inner)(gm, example_inputs)
        return compiled

    def _tell_if_nothing_gains(self, weights: frozenset[tuple[int, int, int, int]]) -> None:
        """Say, once for such weights, that all of them are too small to gain speed."""
        if not torch.is_grad_enabled():
            return  # evaluation may gain less than training; explain tells
        line = nothing_gains(weights, training=True)
        if line and weights not in self._told:
            self._told.add(weights)
            warnings.warn(line, EngineWarning, stacklevel=2)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewritingBackend":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return rewriting_backend, (self.inner, self.engine)


def nothing_gains(weights: Iterable[tuple[int, int, int, int]], training: bool) -> str:
    """The line for a model of which no sparse linear gains speed, as far as was measured, or "".

    Args:
        weights: (d_out, d_in, N, M) of its sparse linears.
        training: whether it is about all three products, or the forward one alone.
    """
    gains = [selection.gain(*weight, training) for weight in weights]
    measured = [gain for gain in gains if gain is not None]
    if not measured or len(measured) < len(gains) or max(measured)[0] >= 1:
        return ""
    best, tokens = max(measured)
    return (
        f"No sparse linear is faster here than its dense one was (at best {best:.2f}x, for "
        f"{tokens} tokens): all are too small to gain speed. What is saved is memory."
    )


def rewriting_backend(
    inner: str | BackendFunction = "inductor", engine: str = AUTO
) -> RewritingBackend:
    """The backend that rewrites for slope_fx ahead of ``inner``.

    For compiling parts of a model by hand, as in
    ``block.compile(backend=slope_fx.rewriting_backend("inductor"))``. ``compile`` does
    this for you.

    Args:
        inner: a torch.compile backend, by name or as a function.
        engine: what may compute the sparse products, as for ``compile``.

    Raises:
        ArgumentError: there is no backend or engine of that name.
    """
    _resolve(inner)
    check_engine(engine)
    try:
        return _backend_of(inner, engine)
    except TypeError as error:
        raise ArgumentError(f"backend={inner!r} must be hashable: {error}.") from None


@functools.cache
def _backend_of(inner: str | BackendFunction, engine: str) -> RewritingBackend:
    return RewritingBackend(inner, engine)


def check_engine(engine: object) -> None:
    """See that ``engine`` names engines that exist, and that a lone one can run here.

    Raises:
        ArgumentError: it doesn't, or it can't.
    """
    if not isinstance(engine, str) or not engine:
        raise ArgumentError(
            f'engine={engine!r}; allowed are "auto", or names of {", ".join(ENGINES)} '
            "separated by commas."
        )
    try:
        named = allowed_engines(engine)
    except EngineError as error:
        raise ArgumentError(str(error)) from None
    if len(named) == 1 and engine != AUTO and (reason := ENGINES[named[0]].unavailable()):
        raise ArgumentError(
            f'engine={engine!r} can\'t be had: {reason}. "auto" takes the best there is.'
        )


def _resolve(inner: str | BackendFunction) -> BackendFunction:
    if not isinstance(inner, str):
        if not callable(inner):
            raise ArgumentError(
                f"backend={inner!r}; allowed are a torch.compile backend's name, "
                "a function (graph, example_inputs) -> function, or None."
            )
        return inner
    try:
        backend = lookup_backend(inner)
    except Exception as error:
        names = ", ".join(sorted(torch.compiler.list_backends(exclude_tags=())))
        raise ArgumentError(
            f"backend={inner!r} is not a torch.compile backend; there are: {names}."
        ) from error
    return cast(BackendFunction, backend)


def _report(gm: GraphModule, leftover: Leftover, example_inputs: Sequence[Any]) -> None:
    """Tell the layer that a leftover marker belongs to, if the graph is for training."""
    placeholder = _outer_placeholder(gm, leftover.gm, leftover.values)
    placeholders = gm.graph.find_nodes(op="placeholder")
    if placeholder not in placeholders:
        return
    values = example_inputs[placeholders.index(placeholder)]
    if not torch.is_grad_enabled():
        return
    reason = f"its weight is used by {', '.join(leftover.used_by)}, which no pass rewrites"
    if leftover.used_by == ("output",):
        reason = (
            "Dynamo compiled the reading of its weight by itself, as it does below a graph break "
            "in one of torch's own containers (nn.Sequential, nn.LSTM)"
        )
    for weight in find_alive(lambda weight: weight.values is values):
        weight.note_expanded(reason)


def _outer_placeholder(outer: GraphModule, gm: GraphModule, node: Node) -> Node:
    """The placeholder of the outermost graph that a nested graph's placeholder stands for."""
    if gm is outer or node.op != "placeholder":
        return node
    for parent in (m for m in outer.modules() if isinstance(m, GraphModule)):
        for _, nested, operands in nested_calls(parent):
            if nested is gm and operands is not None:
                index = gm.graph.find_nodes(op="placeholder").index(node)
                return _outer_placeholder(outer, parent, operands[index])
    return node


def _raiser(error: Exception) -> CompiledFunction:
    def fail(*args: Any) -> Any:
        raise error

    return fail


def compile_module(module: nn.Module, backend: RewritingBackend) -> None:
    """Compile ``module`` in place, keeping its identity and its parameters' names."""
    options: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # torch 2.13 has it
        limit = torch._dynamo.config.recompile_limit
        options["recompile_limit"] = max(limit, RECOMPILE_LIMIT)
    call: Callable[..., Any] = module._call_impl
    if type(module).__module__.startswith("torch.nn."):
        # Dynamo steps over the frames of torch's own modules and would leave an
        # nn.Sequential or nn.Linear uncompiled, so it is given a frame of ours.
        call = _framed(call)
    module._compiled_call_impl = torch.compile(call, backend=backend, **options)


def _framed(call: Callable[..., Any]) -> Callable[..., Any]:
    def framed(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return framed
