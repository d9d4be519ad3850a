"""Sum up the inputs of each linear over calibration batches."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from slope_fx.dynamo import compiled_call
from slope_fx.errors import ArgumentError, ArgumentWarning, first_line
from slope_fx.hub import takes_cache
from slope_fx.passes.observe_linears import Observer, Rows, observe_linears
from slope_fx.planning.activations import Activations
from slope_fx.planning.plan import SparsePlan
from slope_fx.planning.regions import choose_regions
from slope_fx.planning.trace import ExampleInputs, split_inputs

Calibration = Iterable[ExampleInputs] | None


@torch.no_grad()
def observe(
    model: nn.Module, plans: Sequence[SparsePlan], calibration: Calibration, *, grams: bool
) -> dict[str, Activations]:
    """Run the dense ``model`` on each batch, and sum up the inputs of its linears.

    Dynamo traces the model, and :func:`observe_linears` inserts an observer at each linear. The
    model runs in evaluation mode without gradients.

    Args:
        model: the dense model. Its weights and mode do not change, but its forward may change
            buffers and other state.
        plans: plans of the linears to observe.
        calibration: the batches, each in a form of ``example_inputs`` of ``compile``.
        grams: whether to sum x x^T too, which takes d_in * d_in fp32 numbers per linear.

    Returns:
        Layer name -> sums.

    Raises:
        ArgumentError: there is no batch, a batch fails or gives inputs that are not finite, or a
            linear got no input.
    """
    if isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable):
        raise ArgumentError(
            f"calibration is a {type(calibration).__name__}; it must be a list, or another "
            "iterable, of batches, such as [ids, ids]."
        )
    parameters = dict(model.named_parameters())
    sums: dict[int, Activations] = {}
    heights: dict[int, int] = {}
    for plan in plans:
        parameter, layout = parameters[plan.parameter_name], plan.layout
        stack, d_in, device = layout.stack, layout.d_in, parameter.device
        heights[id(parameter)] = layout.d_out
        sums[id(parameter)] = Activations(
            torch.zeros(stack, dtype=torch.int64, device=device),
            torch.zeros(stack, d_in, device=device, dtype=torch.float32),
            torch.zeros(stack, d_in, d_in, device=device, dtype=torch.float32) if grams else None,
        )

    def add(x: Tensor, parameter: Tensor, rows: Rows, offsets: Tensor | None) -> None:
        found = sums.get(id(parameter))
        if found is not None:
            _add(found, x.detach(), rows, heights[id(parameter)], offsets)

    batches = _run(model, plans, calibration, add)
    if not batches:
        raise ArgumentError(
            "calibration has no batch. Pass a few, each as you would call the model with, such "
            "as [ids, ids]."
        )
    result = {plan.name: sums[id(parameters[plan.parameter_name])] for plan in plans}
    for name, found in result.items():
        if not found.rows.any():
            raise ArgumentError(
                f"calibration reached no input of {name}. Pass more batches, or keep it dense: "
                "sparsity={..., that name: None}. If the model calls it, see "
                "TORCH_LOGS=graph_breaks,recompiles for why it wasn't traced."
            )
        if not found.squares.isfinite().all():
            raise ArgumentError(f"calibration gave {name} inputs that are NaN or inf.")
        _fill_unseen(name, found)
    return result


def _fill_unseen(name: str, found: Activations) -> None:
    """Replace the sums of experts without tokens by those of uniform inputs, and warn."""
    unseen = (found.rows == 0).nonzero().flatten().tolist()
    if not unseen:
        return
    found.squares[unseen] = 1.0
    if found.gram is not None:
        found.gram[unseen] = torch.eye(found.gram.shape[-1], device=found.gram.device)
    warnings.warn(
        f"calibration reached no input of {name}'s matrices {', '.join(map(str, unseen))} (of "
        f"{len(found.rows)}): their masks are chosen by magnitude, and their adapters start as "
        'with "svd". Pass more batches.',
        ArgumentWarning,
        stacklevel=4,
    )


def _run(
    model: nn.Module,
    plans: Sequence[SparsePlan],
    calibration: Calibration,
    observer: Observer,
) -> int:
    """Run the batches with observed regions. Returns the number of batches."""
    batches = 0
    with ExitStack() as undo:
        undo.callback(_observers.remove, observer)
        _observers.append(observer)
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
            module.training = False
        # Beyond the recompile limit, Dynamo runs a frame uncompiled, and its linears would be
        # missed silently.
        limits: dict[str, Any] = {"recompile_limit": 4096, "accumulated_recompile_limit": 65536}
        undo.enter_context(torch._dynamo.config.patch(limits))
        for path in choose_regions(model, "auto", plans, {}).paths:
            region = model.get_submodule(path)
            undo.callback(region.__dict__.pop, "_compiled_call_impl")
            region._compiled_call_impl = compiled_call(region, _observing_backend)
        for batch in calibration or ():
            args, kwargs = split_inputs(batch, f"calibration's batch {batches}")
            if takes_cache(model):
                kwargs.setdefault("use_cache", False)  # with a cache, each block is another graph
            try:
                model(*args, **kwargs)
            except Exception as error:
                raise ArgumentError(
                    f"calibration: the model fails on batch {batches} with "
                    f"{type(error).__name__}: {first_line(error)} Each batch is what you would "
                    "call the model with, on its device: a tensor, a sequence of arguments, a "
                    "mapping of keyword arguments, or (arguments, keyword arguments)."
                ) from error
            batches += 1
    return batches


# One backend and one function for the whole process, because Dynamo caches compiled code by the
# identity of the backend, and limits the number of graphs per code object.
_observers: list[Observer] = []


def _observing_backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
    observe_linears(gm, _tell)
    return gm.forward


def _tell(x: Tensor, parameter: Tensor, rows: Rows, offsets: Tensor | None) -> None:
    _observers[-1](x, parameter, rows, offsets)


def _add(sums: Activations, x: Tensor, rows: Rows, d_out: int, offsets: Tensor | None) -> None:
    """Add the inputs of one call to the sums.

    Args:
        sums: sums of the weight.
        x: (..., d_in) for one matrix; (groups, rows, d_in) for a stack; (rows, d_in) for a stack
            with the same input for all matrices, or with ``offsets`` for a grouped product.
        rows: the rows that the call reads, counted over all matrices of the weight.
        d_out: number of rows of each matrix.
        offsets: the end of each group in the rows of x, or None.
    """
    start, stop, groups = rows
    first, last = start // d_out, -(-stop // d_out)
    if groups == 1:
        parts = [x.reshape(-1, x.shape[-1])] * (last - first)
    elif offsets is None:
        parts = list(x) if x.dim() == 3 else [x] * groups
    else:
        parts = [x[a:b] for a, b in pairwise([0, *offsets.tolist()])]
    for i, part in enumerate(parts, first):
        part = part.float()
        sums.rows[i] += len(part)
        sums.squares[i] += part.square().sum(0)
        if sums.gram is not None:
            sums.gram[i].addmm_(part.t(), part)
