"""What the inputs of each linear look like over a few calibration batches."""

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
    """Run ``model``, dense as it still is, on each batch and sum up what its linears read.

    Dynamo traces the model; where it finds one of the weights in a linear, however that is
    written, the linear's input is summed up beside it. The model runs evaluated, without
    gradients, and is left as it was.

    Args:
        model: not changed, nor is its mode; what its forward keeps of its inputs changes.
        plans: of the linears to look at.
        calibration: the batches, each as ``example_inputs`` of ``compile``.
        grams: whether to sum x x^T too, d_in * d_in floats a linear.

    Returns:
        The sums by the layer's name.

    Raises:
        ArgumentError: there is no batch, one doesn't run or gives no finite numbers, or a
            linear was never reached.
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
    """Give experts that no token reached inputs that are all alike, and say so."""
    unseen = (found.rows == 0).nonzero().flatten().tolist()
    if not unseen:
        return
    found.squares[unseen] = 1.0
    if found.gram is not None:
        found.gram[unseen] = torch.eye(found.gram.shape[-1], device=found.gram.device)
    warnings.warn(
        f"calibration reached no input of {name}'s matrices {', '.join(map(str, unseen))} (of "
        f"{len(found.rows)}): they are chosen by magnitude, their adapters begin as by "
        '"svd". Pass more batches to have them seen.',
        ArgumentWarning,
        stacklevel=4,
    )


def _run(
    model: nn.Module,
    plans: Sequence[SparsePlan],
    calibration: Calibration,
    observer: Observer,
) -> int:
    """Run the batches through the model, its regions compiled to be observed."""
    batches = 0
    with ExitStack() as undo:
        undo.callback(_observers.remove, observer)
        _observers.append(observer)
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
            module.training = False
        # A linear in a graph that Dynamo gave up on would be left out without a word.
        limits: dict[str, Any] = {"recompile_limit": 4096, "accumulated_recompile_limit": 65536}
        undo.enter_context(torch._dynamo.config.patch(limits))
        for path in choose_regions(model, "auto", plans, {}).paths:
            region = model.get_submodule(path)
            undo.callback(region.__dict__.pop, "_compiled_call_impl")
            region._compiled_call_impl = compiled_call(region, _observing_backend)
        for batch in calibration or ():
            args, kwargs = split_inputs(batch, f"calibration's batch {batches}")
            if takes_cache(model):
                kwargs.setdefault("use_cache", False)  # each block has its own place in a cache
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


# One backend and one function for the whole process: Dynamo keeps what it compiled by the identity
# of the backend, and no more than some graphs for a function's code.
_observers: list[Observer] = []


def _observing_backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
    observe_linears(gm, _tell)
    return gm.forward


def _tell(x: Tensor, parameter: Tensor, rows: Rows, offsets: Tensor | None) -> None:
    _observers[-1](x, parameter, rows, offsets)


def _add(sums: Activations, x: Tensor, rows: Rows, d_out: int, offsets: Tensor | None) -> None:
    """Add the inputs of one call.

    Args:
        sums: of the weight.
        x: (..., d_in) for one matrix; (groups, rows, d_in) for several; (rows, d_in) for several
            with the same input, or with ``offsets`` for a grouped product.
        rows: what the call reads of the weight, in all of whose matrices rows are counted.
        d_out: rows of each matrix.
        offsets: where each group ends among the rows of x.
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
