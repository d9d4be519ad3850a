"""The torch.compile backend that runs the passes and calls another backend."""

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from slope_fx import ops
from slope_fx.backend.noting import noting
from slope_fx.backend.settings import Settings, UserPass, resolve
from slope_fx.dynamo import BackendFunction, CompiledFunction
from slope_fx.errors import (
    ArgumentError,
    EngineWarning,
    SlopeError,
    UnsupportedError,
)
from slope_fx.kernels import selection
from slope_fx.kernels.cache import digest
from slope_fx.kernels.engines import AUTO
from slope_fx.passes import Context, Leftover, Rewrites, run_passes
from slope_fx.passes.graph import nested_calls
from slope_fx.sparse.parts import Choices
from slope_fx.sparse.weight import SparseWeight, find_alive
from slope_fx.version import __version__


class RewritingBackend:
    """Rewrites a Dynamo graph with the passes, then compiles it with another backend.

    Use :func:`rewriting_backend` to get a backend. Dynamo caches compiled code by the identity of
    the backend, so equal settings must have the same object.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.graphs = 0
        """Number of compiled graphs so far, including recompiles."""
        self._told: set[frozenset[tuple[int, int, int, int]]] = set()

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> CompiledFunction:
        self.graphs += 1
        before, after = self.settings.own_passes()
        context = Context.here(self.settings.engine, self.settings.replays)
        try:
            # Modes of the caller must not affect the passes.
            with context.in_force():
                gm = _run_own(gm, before)
                rewrites = run_passes(gm, context, self.settings.disable_passes)
                compiled = _run_own(gm, after)
            chosen = self._tell(gm, rewrites, example_inputs, context.training)
        except SlopeError as error:
            return _raiser(error)  # an error that is raised here would be wrapped by Dynamo
        return noting(self._compile(compiled, example_inputs), chosen)

    def _tell(
        self, gm: GraphModule, rewrites: Rewrites, example_inputs: Sequence[Any], training: bool
    ) -> dict[int, Choices]:
        """Report problems of the sparse weights of a graph.

        Returns:
            The engines of its products, by the place of the layer's forward mask among the inputs.

        Raises:
            UnsupportedError: the graph writes to a weight.
            ExpandedWeightError: a frozen weight is expanded and ``on_fallback`` is "error".
        """
        owners = _Owners(gm, example_inputs)
        for write in rewrites.writes:
            raise _write_error(owners.of(write.gm, write.mask), write)
        for leftover in rewrites.leftovers if training else ():
            for weight in owners.of(leftover.gm, leftover.mask):
                # No gradient of a dense master tells that the layer trains expanded.
                trains = weight.values.requires_grad and weight.method.compressed
                weight.fallback.note(self._why(leftover), trains=trains)
        sizes: Sizes = {}
        by_place: dict[int, Choices] = {}
        for call in rewrites.calls:
            request = call.request
            chosen = {
                selection.Problem.of(op, request): selection.chosen(op, request)
                for op in call.products
            }
            size = (request.d_out, request.d_in, request.n, request.m)
            sizes.setdefault(size, Choices()).update(chosen)
            place = owners.place_of(call.gm, call.mask)
            if place is not None:
                by_place.setdefault(place, Choices()).update(chosen)
        line = nothing_gains(sizes, training=True) if training else ""
        if line and frozenset(sizes) not in self._told:
            self._told.add(frozenset(sizes))
            warnings.warn(line, EngineWarning, stacklevel=3)
        return by_place

    def _why(self, leftover: Leftover) -> str:
        """The reason why a weight is expanded."""
        if leftover.used_by == ("output",):
            return (
                "Dynamo compiled the reading of its weight as a separate graph, as after a graph "
                "break in one of torch's containers (nn.Sequential, nn.LSTM)"
            )
        disabled = self.settings.disable_passes
        reason = f"its weight is used by {', '.join(leftover.used_by)}, which no pass rewrites"
        return reason + (f" (disabled passes: {', '.join(disabled)})" if disabled else "")

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> CompiledFunction:
        tag = f"{torch.compiler.config.cache_key_tag} slope_fx {_cache_tag()}"
        with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            return self._compile_within(gm, example_inputs)

    def _compile_within(self, gm: GraphModule, example_inputs: Sequence[Any]) -> CompiledFunction:
        settings = self.settings
        if settings.backend == "inductor":
            from torch._inductor.compile_fx import compile_fx  # takes seconds

            patches = settings.inductor_options()
            return cast(CompiledFunction, compile_fx(gm, example_inputs, config_patches=patches))
        more: dict[str, Any] = {}
        if settings.mode not in (None, "default"):
            more["mode"] = settings.mode
        if settings.options:
            more["options"] = dict(settings.options)
        return resolve(settings.backend or "eager")(gm, example_inputs, **more)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RewritingBackend":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return backend_of, (self.settings,)


@functools.cache
def _cache_tag() -> str:
    """A hash of the sources of the ops, for the keys of torch.compile's disk caches.

    A graph has only the names of the ops. Without the hash, code from another version of their
    gradients and fake implementations would be loaded.
    """
    sources = sorted(Path(ops.__file__).parent.glob("*.py"))
    return digest(__version__, *(path.read_text() for path in sources))


def _run_own(gm: GraphModule, passes: Sequence[UserPass]) -> GraphModule:
    """Run passes of the user. Each changes the graph in place or returns another graph.

    Raises:
        ArgumentError: a pass returns another type.
    """
    for own in passes:
        name = getattr(own, "__name__", repr(own))
        result = own(gm)
        if result is not None and not isinstance(result, GraphModule):
            raise ArgumentError(
                f"passes: {name} returned a {type(result).__name__}; a pass changes its "
                "GraphModule in place and returns None, or returns another GraphModule."
            )
        gm = gm if result is None else result
        gm.graph.lint()
        gm.recompile()
    return gm


Sizes = dict[tuple[int, int, int, int], Choices]
"""The engines chosen for weights, by (d_out, d_in, N, M)."""


def nothing_gains(weights: Sizes, training: bool) -> str:
    """The message for a model whose sparse linears are not faster than dense ones, or "".

    Args:
        weights: the engines of its sparse linears.
        training: whether all three products count, or only the forward product.
    """
    gains = [selection.gain(chosen.items(), training) for chosen in weights.values()]
    measured = [gain for gain in gains if gain is not None]
    if not measured or len(measured) < len(gains) or max(measured)[0] >= 1:
        return ""
    best, tokens = max(measured)
    return (
        f"No sparse linear is faster here than the dense linear (at best {best:.2f}x, for "
        f"{tokens} tokens): all are too small to gain speed. What the model saves of memory "
        "is not affected."
    )


def rewriting_backend(
    inner: str | BackendFunction = "inductor",
    engine: str = AUTO,
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    passes: Sequence[Any] = (),
    disable_passes: Sequence[str] = (),
) -> RewritingBackend:
    """Returns the backend that runs the passes of slope_fx and then the backend ``inner``.

    Use it to compile parts of a model yourself, as in
    ``block.compile(backend=slope_fx.rewriting_backend("inductor"))``. ``compile`` uses it
    automatically.

    Args:
        inner: a torch.compile backend, by name or as a function.
        engine: the allowed engines, as for ``compile``.
        mode, options: as for torch.compile, passed to ``inner``.
        passes: your passes, functions of a GraphModule. They run after the passes of slope_fx, or
            before and after ``...``.
        disable_passes: names of passes of slope_fx to skip.

    Raises:
        ArgumentError: a backend, engine, mode, option or pass does not exist.
    """
    if inner is None:
        raise ArgumentError("inner=None; it must be a torch.compile backend, such as 'inductor'.")
    return backend_of(
        Settings.of(
            backend=inner, engine=engine, mode=mode, options=options, passes=passes,
            disable_passes=disable_passes,
        )
    )  # fmt: skip


def backend_of(settings: Settings) -> RewritingBackend:
    """The backend for settings. Settings with equal compilation of graphs share one object."""
    alike = replace(settings, dynamic=None, fullgraph=False, region="auto", on_fallback="warn")
    return _backend_of(alike)


@functools.cache
def _backend_of(settings: Settings) -> RewritingBackend:
    return RewritingBackend(settings)


class _Owners:
    """Finds the layers of the nodes in a graph."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        self._gm = gm
        self._placeholders = gm.graph.find_nodes(op="placeholder")
        self._inputs = example_inputs

    def place_of(self, gm: GraphModule, mask: Node) -> int | None:
        """The index of the input that is the node ``mask`` of ``gm``, or None.

        ``gm`` may be nested in the graph.
        """
        placeholder = _outer_placeholder(self._gm, gm, mask)
        known = placeholder in self._placeholders
        return self._placeholders.index(placeholder) if known else None

    def of(self, gm: GraphModule, mask: Node) -> list[SparseWeight]:
        """The layers whose forward mask is the node ``mask`` of ``gm``."""
        place = self.place_of(gm, mask)
        value = None if place is None else self._inputs[place]
        return [] if value is None else find_alive(lambda weight: weight.forward_bits is value)


def _write_error(weights: Iterable[SparseWeight], write: Leftover) -> UnsupportedError:
    names = [weight.name for weight in weights]
    return UnsupportedError(
        f"{' and '.join(names) or 'a sparse layer'}: the model's forward writes to its `weight` "
        f"({', '.join(write.used_by)}), which is made from its values at each reading, so that "
        "the write would be lost. Keep the layer dense with sparsity={...: None}, switch the "
        "write off in the model (RWKV: config.rescale_every = 0), or write outside of forward, "
        "with slope_fx.sparse_weights(model)[name].write_(dense)."
    )


def _outer_placeholder(outer: GraphModule, gm: GraphModule, node: Node) -> Node:
    """The placeholder of the outer graph for a placeholder of a nested graph."""
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
