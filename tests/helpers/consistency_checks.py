"""The cases that ``consistency.py`` runs a model in, and how far it is from METHOD's formulas.

A case runs a model, whatever road it came by, and METHOD's formulas in float64 (``formulas.py``) on
the same inputs, and says how far loss, logits, every gradient, and masks and weights after
optimizer steps are apart, relative to the largest number of each.
"""

import contextlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slope_fx
from architectures import cast, first_token, loss_and_logits
from consistency_subject import Inputs, Subject
from formulas import FormulaModel, backward_mask, gradient_errors, top_n_mask
from slope_fx.record import record_of

ADAMW = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1}
"""Rounding is not to decide the sign of an update, as it does with a smaller eps."""

Errors = dict[str, float]


class NothingToCompareError(Exception):
    """A road or a case that such a model doesn't have."""


@dataclass
class Answer:
    """A model's losses, one a batch, and its logits."""

    losses: Tensor
    logits: list[Tensor]


def run(
    model: nn.Module, batches: list[Inputs], grad: bool = True, autocast: bool = False
) -> Answer:
    """Forward, and backward if ``grad``, for each batch; gradients add up."""
    model.zero_grad()
    losses, logits = [], []
    with contextlib.nullcontext() if grad else torch.no_grad():
        for inputs in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss, out = loss_and_logits(model, inputs)
            if grad:
                loss.backward()
            losses.append(loss.detach().double())
            logits.append(out.detach().double())
    return Answer(torch.stack(losses), logits)


def apart(got: Tensor, want: Tensor, least: float = 0.0) -> float:
    """The largest difference, relative to the largest entry."""
    scale = max(want.abs().max().item(), least)
    return (got.double() - want.double()).abs().max().item() / max(scale, 1e-30)


def compare(got: Answer, want: Answer) -> Errors:
    pairs = zip(got.logits, want.logits, strict=True)
    logits = {str(i): apart(*pair) for i, pair in enumerate(pairs)}
    return {"loss": apart(got.losses, want.losses), "logits": worst(logits)[0]}


def worst(errors: Errors) -> tuple[float, str]:
    """The largest error, with its name; a NaN is larger than all."""
    return max(((e, n) for n, e in errors.items()), key=lambda p: (math.isnan(p[0]), p[0]))


def plain_gradient_errors(
    model: nn.Module, names: dict[str, Tensor], rough: bool = False
) -> Errors:
    """The same of a dense model's parameters against those of that name."""
    own = dict(model.named_parameters())
    pairs = {n: (own[n].grad, p.grad) for n, p in names.items() if p.grad is not None}
    if rough:
        return rough_errors(pairs)
    floor = 0.01 * max(want.abs().max().item() for _, want in pairs.values())
    return {n: math.nan if g is None else apart(g, w, floor) for n, (g, w) in pairs.items()}


# Cases: a model and its subject in, errors out.
def batches_of(subject: Subject, case: str) -> list[Inputs]:
    if case == "one token":
        return [first_token(subject.inputs)]
    if case == "accumulation":
        # Another of the same shape: rows the other way round, and in each the features or tokens.
        other = {n: v.flip(0).roll(1, -1) for n, v in subject.inputs.items()}
        return [subject.inputs, other]
    return [subject.inputs]


@dataclass
class Results:
    """Errors, and where the worst gradient was."""

    errors: Errors
    where: str = ""

    def add(self, errors: Errors) -> None:
        """Keep the larger error of each check; a NaN is larger than all."""
        for check, error in errors.items():
            self.errors[check], _ = worst({"": self.errors.get(check, 0.0), "this": error})

    def add_gradients(self, errors: Errors) -> None:
        error, where = worst(errors)
        self.where = self.where if error <= self.errors.get("gradients", -1.0) else where
        self.add({"gradients": error})


def against_oracle(subject: Subject, model: nn.Module, case: str) -> Results:
    """A pass forward and, but for "eval", back, held against the oracle.

    A dense model computes the input gradient of ``W^R``, so is held against the formulas with that.
    """
    dense = "_slope_fx" not in model.__dict__
    grad, batches = case != "eval", batches_of(subject, case)
    oracle = subject.oracle(once=dense)
    got = run(model.train(grad), batches, grad, subject.autocast)
    wide = [cast(inputs, torch.float64) for inputs in batches]
    found = Results(compare(got, run(oracle.train(grad), wide, grad)))
    if grad and dense:
        found.add_gradients(plain_gradient_errors(model, oracle.names, subject.rough))
    elif grad:
        found.add_gradients(all_gradient_errors(model, oracle, subject.rough))
    return found


def all_gradient_errors(model: nn.Module, oracle: FormulaModel, rough: bool = False) -> Errors:
    """``gradient_errors``, or those of ``rough_errors``.

    None at all is as good as zeros: a graph leaves out what it knows to be zero, as Mamba's decay
    of no state.
    """
    kept = dict(model.named_parameters())
    for name, parameter in oracle.names.items():
        if kept[name].grad is None and parameter.grad is not None and not parameter.grad.any():
            parameter.grad = None
    if not rough:
        return gradient_errors(model, oracle)
    weights = slope_fx.sparse_weights(model)
    pairs = {n: (kept[n].grad, p.grad) for n, p in oracle.names.items() if p.grad is not None}
    for name, (weight, mask, a, b) in oracle.layers.items():
        sparse = weights[name]
        want, mask = (matrices(t, sparse) for t in (weight.grad, mask))
        pairs[f"{name}.weight"] = sparse.values.grad.flatten(), want[mask]
        if a is not None:
            pairs[f"{name}.lora_A"] = sparse.lora_A.grad, a.grad
            pairs[f"{name}.lora_B"] = sparse.lora_B.grad, b.grad
    return rough_errors(pairs)


def rough_errors(pairs: dict[str, tuple[Tensor | None, Tensor]]) -> Errors:
    """By norms, for in 16 bits rounding switches a ReLU here and there, which makes one element of
    a gradient another; relative to at least a tenth of the largest gradient, times its size."""
    floor = 0.1 * max(want.abs().max().item() for _, want in pairs.values())
    errors = {}
    for name, (got, want) in pairs.items():
        scale = max(want.norm().item(), floor * want.numel() ** 0.5)
        errors[name] = math.nan if got is None else (got.double() - want).norm().item() / scale
    return errors


def around_blocks(model: nn.Module, reentrant: bool) -> Callable[[], None]:
    """Call each compiled block through ``checkpoint``; returns what undoes it."""
    paths = [path for path in record_of(model).regions.paths if path]
    blocks = [model.get_submodule(path) for path in paths]
    calls = [block._compiled_call_impl for block in blocks]

    def through(call: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointed(*args: Any, **kwargs: Any) -> Any:
            def positional(*given: Any) -> Any:  # the reentrant kind takes no others
                return call(
                    *given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True))
                )

            given = (*args, *kwargs.values())
            if not any(isinstance(t, Tensor) and t.requires_grad for t in given):
                return call(*args, **kwargs)  # the reentrant kind would lose all gradients
            return checkpoint(positional, *given, use_reentrant=reentrant)

        return checkpointed

    def undo() -> None:
        for block, call in zip(blocks, calls, strict=True):
            block._compiled_call_impl = call

    for block, call in zip(blocks, calls, strict=True):
        block._compiled_call_impl = through(call)
    return undo


def checkpointed(subject: Subject, model: nn.Module, case: str) -> Results:
    """Activation checkpointing, around compiled blocks or as transformers does it."""
    reentrant = "non-reentrant" not in case
    if "around" in case:
        if record_of(model).regions.whole:
            raise NothingToCompareError("none: it is compiled as a whole")
        undo = around_blocks(model, reentrant)
    elif getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        undo = model.gradient_checkpointing_disable
    elif hasattr(model, "enable_gradient_checkpointing") and not reentrant:
        model.enable_gradient_checkpointing()
        undo = model.disable_gradient_checkpointing
    else:
        raise NothingToCompareError("none: the model has no such activation checkpointing")
    try:
        return against_oracle(subject, model, "train")
    finally:
        undo()


def steps(subject: Subject, model: nn.Module, case: str) -> Results:
    """Two steps of AdamW, backward masks chosen anew after each, held against the same of the
    oracle, which goes on from its own weights."""
    oracle, schedule = subject.oracle(), subject.schedule(model.train())
    start = {name: p.detach().clone() for name, (_, p) in pairs_of(model, oracle).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
    own = torch.optim.AdamW([p for _, p in pairs_of(model, oracle).values()], **ADAMW)
    wide, found = [cast(subject.inputs, torch.float64)], Results({})
    for step in range(3):
        own.zero_grad()  # of the oracle's adapters too, which are no parameters of a module
        found.add(compare(run(model, [subject.inputs]), run(oracle, wide)))
        found.add_gradients(all_gradient_errors(model, oracle))
        if step == 2:
            break
        for weight, mask, *_ in oracle.layers.values():
            weight.grad *= mask
        optimizer.step(), own.step()
        with warnings.catch_warnings():  # of adapters that are asleep, as they are meant to be
            warnings.simplefilter("ignore", slope_fx.errors.TrainingWarning)
            schedule.step()
        found.add({"masks": refresh_masks(model, oracle)})
    for name, (got, want) in pairs_of(model, oracle).items():
        moved = want.detach() - start[name]
        found.add({"weights": apart(got.detach() - start[name], moved, 0.1 * ADAMW["lr"])})
    return found


def pairs_of(model: nn.Module, oracle: FormulaModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Each parameter as the compiled model has it now, in the dense shape, and the oracle's."""
    kept = dict(model.named_parameters())
    pairs = {n: (kept[n], p) for n, p in oracle.names.items() if p.requires_grad}
    weights = slope_fx.sparse_weights(model)
    for sparse, like in oracle.pruned:
        weight, _, a, b = oracle.layers[sparse.name]
        now = weights[sparse.name]
        pairs[f"{sparse.name}.weight"] = like(now.to_dense()), weight
        if a is not None:
            pairs[f"{sparse.name}.lora_A"] = now.lora_A, a
            pairs[f"{sparse.name}.lora_B"] = now.lora_B, b
    return pairs


def matrices(parameter: Tensor, sparse: Any) -> Tensor:
    """A parameter as (stack, d_out, d_in)."""
    if sparse.layout.transposed:
        return parameter.reshape(sparse.stack, sparse.d_in, sparse.d_out).mT
    return parameter.reshape(sparse.stack, sparse.d_out, sparse.d_in)


def refresh_masks(model: nn.Module, oracle: FormulaModel) -> float:
    """Choose the oracle's backward masks from its own weights; how far the model's are from these.

    Of near-ties either may be kept, so that sums of magnitudes are compared, and the oracle goes on
    with the model's.
    """
    largest = 0.0
    weights = slope_fx.sparse_weights(model)
    for sparse, like in oracle.pruned:
        weight, forward, *_ = oracle.layers[sparse.name]
        w, forward = matrices(weight.detach(), sparse), matrices(forward, sparse)
        theirs = weights[sparse.name].backward_mask().view(w.shape)
        for matrix, kept, their in zip(w, forward, theirs, strict=True):
            mine = backward_mask(matrix, kept, sparse.n, sparse.m)
            sums = [
                (matrix.abs() * m).view(-1, sparse.m, sparse.d_in).sum(1) for m in (mine, their)
            ]
            wrong = (their & ~kept).any() or mine.sum() != their.sum()
            largest = max(largest, math.inf if wrong else apart(*sums))
        oracle.twice_pruned[sparse.name] = like(theirs)
    return largest


def masks(subject: Subject, model: nn.Module, case: str) -> Results:
    """Masks and weights as compressed, against METHOD's choice on the dense model's parameters."""
    found = Results({})
    parameters = dict(subject.dense.named_parameters(remove_duplicate=False))
    oracle = subject.oracle()
    found.add({"masks": refresh_masks(model, oracle)})
    for sparse, _ in oracle.pruned:
        weight, forward, *_ = oracle.layers[sparse.name]
        name = sparse.name if sparse.name in parameters else f"{sparse.name}.weight"
        dense = matrices(parameters[name].detach().double(), sparse)
        mine = torch.stack([top_n_mask(w.abs(), sparse.n, sparse.m) for w in dense])
        differ = int((mine != matrices(forward, sparse)).sum())
        found.add({"masks": float(differ)})
        found.add({"weights": apart(matrices(weight, sparse), dense * mine)})
    return found


CASES: dict[str, Callable[[Subject, nn.Module, str], Results]] = {
    **dict.fromkeys(("train", "eval", "one token", "accumulation"), against_oracle),
    **dict.fromkeys(
        (f"checkpoint{where}, {kind}" for where in ("", " around") for kind in
         ("reentrant", "non-reentrant")),
        checkpointed,
    ),
    "steps": steps,
    "masks": masks,
}  # fmt: skip
