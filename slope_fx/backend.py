"""The torch.compile backend that runs the passes and hands the graph on."""

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, cast

import torch
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule, Node

from slope_fx import ops
from slope_fx.errors import (
    ArgumentError,
    EngineWarning,
    ExpandedWeightError,
    WeightWriteError,
)
from slope_fx.graphs import environment_recorder, remember
from slope_fx.kernels import selection
from slope_fx.kernels.cache import digest
from slope_fx.kernels.engines import AUTO
from slope_fx.passes import OFF, Context, Leftover, run_passes
from slope_fx.passes.graph import nested_calls
from slope_fx.settings import (
    BackendFunction,
    CompiledFunction,
    Settings,
    UserPass,
    make_settings,
    resolve,
)
from slope_fx.version import __version__
from slope_fx.weights import SparseWeight, find_alive

RECOMPILE_LIMIT = 32
"""Dynamo's own limit of 8 is soon reached by one block's code in two phases, training and
evaluating, with and without a cache; past it a sparse layer runs expanded."""

VARIANTS = 8
"""In how many circumstances each graph may be met: phases, training and not, autocast, shapes."""

log = logging.getLogger(__name__)


class RewritingBackend:
    """Rewrites a Dynamo graph with the passes, then compiles it with another backend.

    Get one from :func:`rewriting_backend`: Dynamo keeps its compiled code by the identity
    of the backend, so there must be one object for equal settings.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.graphs = 0
        """Graphs compiled so far, recompiles included."""
        self._told: set[frozenset[tuple[int, int, int, int]]] = set()

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> CompiledFunction:
        self.graphs += 1
        settings = self.settings
        before, after = settings.own_passes()
        context = Context.here(settings.engine, settings.replays)
        # None of the caller's modes sees any of this, or changes it.
        with context.in_force():
            gm = _run_own(gm, before)
            remember(gm, context, settings.disabled, example_inputs)
            rewrites = run_passes(gm, context, settings.disabled, environment_recorder())
            compiled = _run_own(gm, after)
        if rewrites.writes:
            return _raiser(_write_error(gm, rewrites.writes[0], example_inputs))
        if context.training:
            try:
                for leftover in rewrites.leftovers:
                    _report(gm, leftover, example_inputs, settings.disabled)
            except ExpandedWeightError as error:
                # Raised from here it would reach the user wrapped in Dynamo's own error.
                return _raiser(error)
            self._tell_if_nothing_gains(rewrites.weights)
        return self._compile(compiled, example_inputs)

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> CompiledFunction:
        tag = f"{torch.compiler.config.cache_key_tag} slope_fx {_cache_tag()}"
        with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            return self._compile_within(gm, example_inputs)

    def _compile_within(self, gm: GraphModule, example_inputs: Sequence[Any]) -> CompiledFunction:
        settings = self.settings
        if settings.inner == "inductor":
            patches = settings.inductor_options()
            return cast(CompiledFunction, compile_fx(gm, example_inputs, config_patches=patches))
        more: dict[str, Any] = {}
        if settings.mode not in (None, "default"):
            more["mode"] = settings.mode
        if settings.options:
            more["options"] = dict(settings.options)
        compiled = resolve(settings.inner)(gm, example_inputs, **more)
        return compiled

    def _tell_if_nothing_gains(self, weights: frozenset[tuple[int, int, int, int]]) -> None:
        """Say, once for such weights, that all of them are too small to gain speed in training.

        Evaluation may gain less than training; explain tells that.
        """
        line = nothing_gains(weights, training=True)
        if line and weights not in self._told:
            self._told.add(weights)
            warnings.warn(line, EngineWarning, stacklevel=2)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewritingBackend":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return backend_of, (self.settings,)


@functools.cache
def _cache_tag() -> str:
    """What torch.compile's caches on disk must tell apart besides the graph.

    The graph names our ops, not what their gradients and fake tensors are, which is in their
    sources: another version's would be taken for this one's.
    """
    sources = sorted(Path(ops.__file__).parent.glob("*.py"))
    return digest(__version__, *(path.read_text() for path in sources))


def _run_own(gm: GraphModule, passes: Sequence[UserPass]) -> GraphModule:
    """Run the user's passes; one may change the graph in place, or return another."""
    for own in passes:
        name = getattr(own, "__name__", repr(own))
        result = own(gm)
        if result is not None and not isinstance(result, GraphModule):
            raise ArgumentError(
                f"passes: {name} returned a {type(result).__name__}; a pass changes the "
                "GraphModule it is given and returns None, or returns another GraphModule."
            )
        gm = gm if result is None else result
        gm.graph.lint()
        gm.recompile()
    return gm


def nothing_gains(weights: Iterable[tuple[int, int, int, int]], training: bool) -> str:
    """The line for a model of which no sparse linear gains speed, as far as was measured, or "".

    Args:
        weights: (d_out, d_in, N, M) of its sparse linears.
        training: whether it is about all three products, or the forward one alone.
    """
    gains = [selection.gain(selection.choices(*weight), training) for weight in weights]
    measured = [gain for gain in gains if gain is not None]
    if not measured or len(measured) < len(gains) or max(measured)[0] >= 1:
        return ""
    best, tokens = max(measured)
    return (
        f"No sparse linear is faster here than its dense one was (at best {best:.2f}x, for "
        f"{tokens} tokens): all are too small to gain speed. What is saved is memory."
    )


def rewriting_backend(
    inner: str | BackendFunction = "inductor",
    engine: str = AUTO,
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    passes: Sequence[Any] = (),
    disable_passes: Sequence[str] = (),
    enable_passes: Sequence[str] = (),
) -> RewritingBackend:
    """The backend that rewrites for slope_fx ahead of ``inner``.

    For compiling parts of a model by hand, as in
    ``block.compile(backend=slope_fx.rewriting_backend("inductor"))``. ``compile`` does
    this for you.

    Args:
        inner: a torch.compile backend, by name or as a function.
        engine: what may compute the sparse products, as for ``compile``.
        mode, options: as of torch.compile, for ``inner``.
        passes: your own passes, functions of a GraphModule, after ours or around ``...``.
        disable_passes: names of ours to leave out.
        enable_passes: names of ours to run that are off by default.

    Raises:
        ArgumentError: there is no backend, engine, mode, option or pass of that name.
    """
    settings = make_settings(inner, engine, mode, options, passes, disable_passes, enable_passes)
    return backend_of(settings)


@functools.cache
def backend_of(settings: Settings) -> RewritingBackend:
    """The one backend of such settings."""
    return RewritingBackend(settings)


def _layers(
    gm: GraphModule, leftover: Leftover, example_inputs: Sequence[Any]
) -> list[SparseWeight]:
    """The layers that a marker in ``gm``, or in a graph nested in it, belongs to."""
    placeholder = _outer_placeholder(gm, leftover.gm, leftover.values)
    placeholders = gm.graph.find_nodes(op="placeholder")
    if placeholder not in placeholders:
        return []
    values = example_inputs[placeholders.index(placeholder)]
    return find_alive(lambda weight: weight.values is values)


def _report(
    gm: GraphModule, leftover: Leftover, example_inputs: Sequence[Any], disabled: Sequence[str]
) -> None:
    """Tell the layer that a leftover marker belongs to, in a graph that is for training."""
    reason = f"its weight is used by {', '.join(leftover.used_by)}, which no pass rewrites"
    if left_out := [name for name in disabled if name not in OFF]:
        reason += f" (disabled are {', '.join(left_out)})"
    if leftover.used_by == ("output",):
        reason = (
            "Dynamo compiled the reading of its weight by itself, as it does below a graph break "
            "in one of torch's own containers (nn.Sequential, nn.LSTM)"
        )
    for weight in _layers(gm, leftover, example_inputs):
        weight.note_expanded(reason)


def _write_error(
    gm: GraphModule, write: Leftover, example_inputs: Sequence[Any]
) -> WeightWriteError:
    names = [weight.name for weight in _layers(gm, write, example_inputs)]
    return WeightWriteError(
        f"{' and '.join(names) or 'a sparse layer'}: the model's forward writes to its `weight` "
        f"({', '.join(write.used_by)}), which is made from its values at each reading, so that "
        "the write would be lost. Keep the layer dense with sparsity={...: None}, switch the "
        "write off in the model (RWKV: config.rescale_every = 0), or write outside of forward, "
        "with slope_fx.sparse_weights(model)[name].write_(dense)."
    )


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


def compiled_call(
    module: nn.Module,
    backend: BackendFunction,
    *,
    kind: Hashable = 0,
    kinds: int = 1,
    **options: Any,
) -> Callable[..., Any]:
    """``module``'s call, compiled by ``backend``.

    Args:
        module: the module.
        backend: what compiles it.
        kind: equal for modules that are to share compiled code, as those of equal graphs do.
        kinds: how many such graphs there are: as many recompiles must be allowed in each of the
            variants (phase, training, autocast) that a run may meet.
        options: torch.compile's.
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

    # Dynamo counts recompiles by code: each kind has code of its own, so that none uses up the
    # limit of another.
    framed.__code__ = _code_of(framed.__code__, kind)
    return framed


@functools.cache
def _code_of(code: CodeType, kind: Hashable) -> CodeType:
    return code.replace(co_name=f"framed_{hash(kind) & 0xFFFFFFFF:x}")
