"""Find the first pass that changes the results of a graph."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slope_fx.backend.settings import Settings
from slope_fx.dynamo import compiled_call
from slope_fx.errors import ArgumentError
from slope_fx.kernels.packing import unpack
from slope_fx.passes import PASSES, Context, run_passes
from slope_fx.record import sparse_weights, trainable_record_of
from slope_fx.sparse.weight import SparseWeight

Weights = dict[int, SparseWeight]
"""Sparse weights by the address of their values."""


@dataclass(frozen=True)
class Difference:
    """The first change of the results of a graph.

    Attributes:
        graph: number of the graph, in the order of compilation.
        name: name of the pass.
        what: "output 0", or "the gradient of ..." with the name of a graph input.
        error: largest absolute difference, divided by the largest absolute value of the tensor.
            inf if NaN or inf occur at different places.
        matches: number of matches of the pass.
    """

    graph: int
    name: str
    what: str
    error: float
    matches: int

    def __str__(self) -> str:
        return (
            f"graph {self.graph}: after {self.name} ({self.matches} matches) {self.what} differs "
            f"by {self.error:.1e} of its largest number"
        )


def first_difference(
    model: nn.Module, *args: Any, tolerance: float = 1e-3, **kwargs: Any
) -> Difference | None:
    """Run ``model`` on inputs, and find the first pass that changes the results of a graph.

    Each traced graph runs in eager mode before the passes and after each pass, with the same
    inputs and random state. Outputs and gradients are compared. The values that the backward masks
    prune are set to zero for this, because the double pruning changes gradients on purpose. The
    function resets Dynamo: code that torch.compile compiled in this process is compiled again at
    its next call.

    Args:
        model: the object that :func:`slope_fx.compile` returned.
        args, kwargs: arguments of the model's forward.
        tolerance: allowed difference, relative to the largest absolute value of a tensor.

    Returns:
        The first difference, or None if no pass changes the results.

    Raises:
        StateError: ``model`` is not compiled by slope_fx, or is frozen.
        ArgumentError: ``model`` is compiled with ``backend=None``, Dynamo compiles no graph of it,
            or the tolerance is not positive.
    """
    record = trainable_record_of(model)
    if record.settings.backend is None:
        raise ArgumentError("model was compiled with backend=None, so it has no graphs to look at.")
    if not tolerance > 0:
        raise ArgumentError(f"tolerance={tolerance!r}; it must be a positive number.")
    found: list[Difference] = []
    weights = {w.values.data_ptr(): w for w in sparse_weights(model).values()}
    graphs = 0

    def look(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs, number = graphs + 1, graphs

        def run(*inputs: Any) -> Any:
            if not found:
                found.extend(_compare(gm, inputs, weights, record.settings, number, tolerance))
            return gm(*inputs)

        return run

    state = _training_state(model)
    calls = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    try:
        for module in calls:
            module._compiled_call_impl = None
        torch._dynamo.reset()
        compiled_call(model, look)(*args, **kwargs)
    finally:
        for module, call in calls.items():
            module._compiled_call_impl = call
        torch._dynamo.reset()
        state()
    if not graphs:
        raise ArgumentError(
            "Nothing of the model was compiled; see TORCH_LOGS=graph_breaks for why."
        )
    return found[0] if found else None


def _compare(
    gm: GraphModule,
    inputs: Sequence[Any],
    weights: Weights,
    settings: Settings,
    number: int,
    tolerance: float,
) -> list[Difference]:
    context = Context.here(settings.engine, settings.replays)
    want = _results(copy.deepcopy(gm), inputs, weights)
    changed = copy.deepcopy(gm)
    for step in PASSES:
        if step.name in settings.disable_passes:
            continue
        report = run_passes(changed, context, passes=(step,)).reports[0]
        if not report.matches:
            continue
        got = _results(copy.deepcopy(changed), inputs, weights)
        for (what, mine), (_, theirs) in zip(got, want, strict=True):
            error = _error(mine, theirs)
            if error > tolerance:
                return [Difference(number, step.name, what, error, report.matches)]
    return []


def _results(
    gm: GraphModule, inputs: Sequence[Any], weights: Weights
) -> list[tuple[str, Tensor | None]]:
    """The outputs, and the gradients of the inputs for random gradients of the outputs."""

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copied = value.detach().clone()
        weight = weights.get(value.data_ptr())
        if weight is not None and value.shape == weight.values.shape:
            copied *= unpack(weight.backward_bits, value.shape[1])
        return copied.requires_grad_(value.requires_grad)

    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    leaves = [fresh(value) for value in inputs]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        # A graph may write to its inputs, which autograd does not allow for leaves.
        outputs = gm(*[t.clone() if isinstance(t, Tensor) else t for t in leaves])
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    results: list[tuple[str, Tensor | None]] = [
        (f"output {i}", out.detach()) for i, out in enumerate(outputs) if isinstance(out, Tensor)
    ]
    roots = [out for out in outputs if isinstance(out, Tensor) and out.requires_grad]
    wanted = [
        (f"the gradient of {name}", leaf)
        for name, leaf in zip(names, leaves, strict=True)
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    if roots and wanted and torch.is_grad_enabled():
        generator = torch.Generator().manual_seed(0)
        seeds = [torch.randn(r.shape, generator=generator).to(r.device, r.dtype) for r in roots]
        grads = torch.autograd.grad(roots, [leaf for _, leaf in wanted], seeds, allow_unused=True)
        results += [(what, grad) for (what, _), grad in zip(wanted, grads, strict=True)]
    return results


def _error(mine: Tensor | None, theirs: Tensor | None) -> float:
    if mine is None or theirs is None:
        return 0.0 if mine is theirs else float("inf")
    if not mine.dtype.is_floating_point:
        return 0.0 if torch.equal(mine, theirs) else float("inf")
    a, b = mine.double(), theirs.double()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return float("inf")
    largest = b[finite].abs().max().item() if bool(finite.any()) else 0.0
    apart = (a - b)[finite].abs().max().item() if bool(finite.any()) else 0.0
    return apart / max(largest, torch.finfo(torch.float32).tiny)


def _training_state(model: nn.Module) -> Callable[[], None]:
    """A function that restores the buffers of ``model`` and the random state."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    random = torch.get_rng_state()

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        torch.set_rng_state(random)

    return restore


__all__ = ["Difference", "first_difference"]
