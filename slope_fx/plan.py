"""Decide, before anything is changed, what becomes of every linear."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsIndex, cast

import torch
from torch import Tensor, nn

from slope_fx import ops
from slope_fx.errors import AdapterRankError, ArgumentError, MaskError
from slope_fx.kernels.packing import pack
from slope_fx.passes import WeightRole
from slope_fx.passes.views import Layout, common_layout
from slope_fx.patterns import Pattern, PatternRules
from slope_fx.trace import Trace, linear_modules
from slope_fx.weights import mask_problem, sparse_name, values_name

MaskChoice = str | Callable[[str, Tensor], Tensor]
AdapterRank = int | float | None

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype that weights may have, by its name or as it is; None stays None.

    Raises:
        ArgumentError: it is another.
    """
    names = {str(known).removeprefix("torch."): known for known in SUPPORTED_DTYPES}
    known = names.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and known not in SUPPORTED_DTYPES:
        raise ArgumentError(f"dtype={dtype!r}; allowed are {', '.join(names)}, and None.")
    return known


@dataclass(frozen=True)
class LinearPlan:
    """The fate of one linear weight.

    Attributes:
        name: the layer's qualified name (its parameter's, less a final ``.weight``).
        parameter_name: the parameter's first qualified name; "" where there is none.
        shape: (d_out, d_in); of a stack of weights (stack, d_out, d_in); or the parameter's own
            shape where that isn't known.
        layout: how the parameter holds that; None where that isn't known.
        rows: what its products give: d_out, or less where they take it in parts.
        pattern: N:M, or None for dense.
        reason: why it stays dense; "" for sparse.
        scopes: the modules whose forward uses it.
        bytes_dense: of the dense weight.
    """

    name: str
    parameter_name: str
    shape: tuple[int, ...]
    layout: Layout | None
    rows: tuple[int, ...]
    pattern: Pattern | None
    reason: str
    scopes: tuple[str, ...]
    bytes_dense: int


@dataclass(frozen=True)
class Skips:
    """Which linears are left dense for their part in the model: ``skip_...`` of ``compile``."""

    first: bool = True
    head: bool = True
    router: bool = True


def plan_linears(
    model: nn.Module, trace: Trace, rules: PatternRules, skips: Skips
) -> list[LinearPlan]:
    """A plan for each linear of ``model``, in the order of its parameters."""
    aliases: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(parameter_name)
    plans = []
    reached = set()
    for parameter_name, parameter in model.named_parameters():
        role = trace.roles.get(parameter_name)
        if role is None:
            continue
        reached.add(id(parameter))
        layer = _layer_name(aliases[id(parameter)], role)
        own_shape = tuple(parameter.shape)
        layout = common_layout(role.reads, own_shape) if role.reads else ""
        shape = own_shape
        if isinstance(layout, Layout):
            stack = (layout.stack,) if layout.stack > 1 else ()
            shape = (*stack, layout.d_out, layout.d_in)
        pattern, reason = rules.select(layer)
        if pattern is not None:
            reason = _why_dense(parameter, role, layout, pattern, skips)
            reason = reason or _why_not_here(model, aliases[id(parameter)])
        plans.append(
            LinearPlan(
                name=layer,
                parameter_name=parameter_name,
                shape=shape,
                layout=layout if isinstance(layout, Layout) else None,
                rows=tuple(sorted({(r.stop - r.start) // r.groups for r in role.reads})),
                pattern=None if reason else pattern,
                reason=reason,
                scopes=tuple(dict.fromkeys(role.scopes)),
                bytes_dense=parameter.numel() * parameter.element_size(),
            )
        )
    for name, module in linear_modules(model).items():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in reached:
            continue
        rules.select(name)
        why = "its weight is computed, not a parameter of its own"
        if weight is not None:
            why = "the traced forward doesn't use it"
        computed = getattr(module, "weight", None) if weight is None else weight
        shape = tuple(computed.shape) if isinstance(computed, Tensor) else ()
        size = computed.numel() * computed.element_size() if isinstance(computed, Tensor) else 0
        plans.append(LinearPlan(name, "", shape, None, (), None, why, (), size))
    return plans + (_unknown(model, reached) if trace.untraced_because else [])


def _unknown(model: nn.Module, reached: set[int]) -> list[LinearPlan]:
    """Matrices of modules that aren't torch's, in a model that was not traced: stacks of experts,
    for example, may be linears of which nothing is known."""
    why = "the model was not traced, so what its module does with it isn't known"
    return [
        LinearPlan(
            f"{path}.{name}" if path else name, "", tuple(parameter.shape), None, (), None, why, (),
            parameter.numel() * parameter.element_size(),
        )
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.")
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() > 1 and id(parameter) not in reached
    ]  # fmt: skip


def _layer_name(aliases: list[str], role: WeightRole) -> str:
    """Of a shared parameter's names, the one under which a linear uses it."""
    names = [alias.removesuffix(".weight") for alias in aliases]
    return next((name for name in names if name in role.scopes), names[0])


def _why_dense(
    parameter: nn.Parameter,
    role: WeightRole,
    layout: Layout | str,
    pattern: Pattern,
    skips: Skips,
) -> str:
    """The first reason to leave a weight dense, or "" if there is none."""
    others = ", ".join(dict.fromkeys(role.other_uses))
    if not role.reads:
        return f"its weight is used through {others}"
    if others:
        return f"shared: its weight is also used by {others}"
    if isinstance(layout, str):
        return layout
    if skips.head and role.makes_output:
        return "output head (skip_head)"
    if skips.router and role.chooses:
        return "a router: its output is ranked to choose something (skip_router)"
    if skips.first and role.reads_embeddings:
        return "fed directly by the embeddings (skip_first)"
    if skips.first and role.reads_input:
        return "fed directly by the model's input (skip_first)"
    if type(parameter) is not nn.Parameter:
        return f"its weight is a {type(parameter).__name__}, not a plain parameter"
    if parameter.dtype not in SUPPORTED_DTYPES:
        return f"its weight is {parameter.dtype}"
    if layout.d_in % pattern.m:
        return f"its input width {layout.d_in} is not divisible by {pattern.m}"
    if layout.d_out % pattern.m:
        return f"its output width {layout.d_out} is not divisible by {pattern.m}"
    for read in role.reads:
        if read.start % pattern.m or (read.stop - read.start) // read.groups % pattern.m:
            return (
                f"a linear uses its rows {read.start} to {read.stop} alone, which aren't whole "
                f"groups of {pattern.m}"
            )
    return ""


def _why_not_here(model: nn.Module, aliases: list[str]) -> str:
    """A reason to leave a weight dense that lies in the modules around it, or ""."""
    for alias in aliases:
        path, _, attribute = alias.rpartition(".")
        owner = model.get_submodule(path)
        for name in (values_name(attribute), sparse_name(attribute)):
            if hasattr(owner, name):
                return f"its module has a {name} of its own"
    return ""


def check_mask_choice(mask: MaskChoice) -> None:
    """Raise ArgumentError unless ``mask`` is one of the allowed choices."""
    known = isinstance(mask, str) and mask in ("magnitude", "random", "wanda")
    if not known and not callable(mask):
        got = repr(mask) if isinstance(mask, str) else f"a {type(mask).__name__}"
        raise ArgumentError(
            f'mask is {got}; allowed are "magnitude", "random", "wanda", or a callable '
            "(name, weight) -> bool tensor like weight."
        )


@torch.no_grad()
def choose_mask(
    mask: MaskChoice, name: str, weight: Tensor, pattern: Pattern, squares: Tensor | None = None
) -> Tensor:
    """The packed forward mask of a layer.

    Args:
        mask: the ``mask`` argument of ``compile``.
        name: the layer's name.
        weight: (d_out, d_in), or (stack, d_out, d_in).
        pattern: N:M.
        squares: for "wanda", the sum of each input's squares, (d_in,) or (stack, d_in).

    Raises:
        MaskError: a callable's mask has the wrong type or shape, or isn't N:M.
    """
    flat = weight.reshape(-1, weight.shape[-1])
    if mask == "magnitude":
        return ops.magnitude_mask(flat, pattern.n, pattern.m)
    if mask == "wanda":
        # |W_ij| |X_j|, with the norm of each input over the calibration tokens (Wanda, arXiv
        # 2306.11695). The paper compares within a row, which N:M groups do anyway.
        assert squares is not None
        scores = weight.abs().float() * squares.sqrt().unsqueeze(-2)
        return ops.magnitude_mask(scores.view(flat.shape), pattern.n, pattern.m)
    if mask == "random":
        # The top N of independent draws: each choice of N places is as likely as another.
        scores = torch.rand(flat.shape, device=weight.device)
        return ops.magnitude_mask(scores, pattern.n, pattern.m)
    assert callable(mask)
    chosen = mask(name, weight)
    where = f"mask({name!r}, weight)"
    if not isinstance(chosen, Tensor) or chosen.dtype is not torch.bool:
        got = chosen.dtype if isinstance(chosen, Tensor) else type(chosen).__name__
        raise MaskError(f"{where} returned {got}; it must return a torch.bool tensor.")
    if chosen.shape != weight.shape:
        raise MaskError(
            f"{where} returned shape {tuple(chosen.shape)}; it must be the weight's, "
            f"(d_out, d_in) = {tuple(weight.shape)}."
        )
    chosen = chosen.reshape(flat.shape)
    problem = mask_problem(chosen.contiguous(), pattern)
    if problem:
        raise MaskError(f"{where} isn't {pattern}: {problem}.")
    return pack(chosen.to(weight.device))


def check_adapter_rank(adapter_rank: AdapterRank) -> AdapterRank:
    """``adapter_rank`` as a plain number.

    Raises:
        AdapterRankError: it could not be a rank of any layer.
    """
    good = adapter_rank is None
    if not good and not isinstance(adapter_rank, bool):
        if hasattr(adapter_rank, "__index__"):  # NumPy's integers are welcome
            adapter_rank = operator.index(cast(SupportsIndex, adapter_rank))
            good = adapter_rank >= 1
        else:
            good = isinstance(adapter_rank, float) and 0 < adapter_rank < 1
    if not good:
        raise AdapterRankError(
            f"adapter_rank={adapter_rank!r}; allowed are a positive int, a float between 0 and 1 "
            "(a fraction of each layer's input width), or None for no adapters."
        )
    return adapter_rank


def layer_rank(adapter_rank: AdapterRank, plan: LinearPlan) -> int | None:
    """The adapter's rank for one layer.

    Raises:
        AdapterRankError: the rank is larger than the layer.
    """
    if adapter_rank is None:
        return None
    d_out, d_in = plan.shape[-2:]
    rank = adapter_rank if isinstance(adapter_rank, int) else max(1, round(adapter_rank * d_in))
    if rank > min(d_out, d_in):
        raise AdapterRankError(
            f"adapter_rank={adapter_rank!r} is rank {rank} for {plan.name}, which is only "
            f"(d_out, d_in) = ({d_out}, {d_in}); at most {min(d_out, d_in)} is allowed there. "
            "Use a smaller rank, or a float for a fraction of each layer's width."
        )
    return rank
