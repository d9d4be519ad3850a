"""Decide which linears of a model are pruned. Nothing is changed here."""

from dataclasses import dataclass

from torch import Tensor, nn

from slope_fx.errors import ArgumentError
from slope_fx.passes import WeightRole
from slope_fx.passes.views import Layout, common_layout
from slope_fx.planning.config import SUPPORTED_DTYPES, SlopeConfig
from slope_fx.planning.patterns import Pattern, PatternRules
from slope_fx.planning.trace import Trace, linear_modules


@dataclass(frozen=True)
class LinearPlan:
    """The plan of one linear weight: a :class:`SparsePlan` or a :class:`DensePlan`.

    Attributes:
        name: qualified name of the layer (the parameter's name without a final ``.weight``).
        parameter_name: first qualified name of the parameter, or "" without a parameter.
        shape: (d_out, d_in), or (stack, d_out, d_in) for a stack of weights, or the shape of the
            parameter if its use is unknown.
        scopes: paths of the modules whose forward uses the weight.
        bytes_dense: size of the dense weight in bytes.
    """

    name: str
    parameter_name: str
    shape: tuple[int, ...]
    scopes: tuple[str, ...]
    bytes_dense: int


@dataclass(frozen=True)
class SparsePlan(LinearPlan):
    """A linear weight that is pruned.

    Attributes:
        pattern: the N:M pattern.
        layout: layout of the matrix, or of the stack of matrices, in the parameter.
        rows: the output sizes of the products: d_out, or less if a linear reads a part of the
            rows.
    """

    pattern: Pattern
    layout: Layout
    rows: tuple[int, ...]


@dataclass(frozen=True)
class DensePlan(LinearPlan):
    """A linear weight that stays dense.

    Attributes:
        reason: the reason why the weight stays dense.
    """

    reason: str


def sparse_plans(plans: "list[LinearPlan] | tuple[LinearPlan, ...]") -> list[SparsePlan]:
    """The sparse plans among ``plans``."""
    return [plan for plan in plans if isinstance(plan, SparsePlan)]


def left_dense(plan: LinearPlan, reason: str) -> DensePlan:
    """The plan of a linear that stays dense, with its own reason if it has one."""
    if isinstance(plan, DensePlan):
        return plan
    about = plan.name, plan.parameter_name, plan.shape, plan.scopes, plan.bytes_dense
    return DensePlan(*about, reason=reason)


def values_name(attribute: str) -> str:
    """The name of the parameter with the values of ``attribute``."""
    return f"{attribute}_values"


def sparse_name(attribute: str) -> str:
    """The name of the submodule with the masks and the adapter of ``attribute``."""
    return f"{attribute}_sparse"


def plan_linears(
    model: nn.Module, trace: Trace, config: SlopeConfig, rules: PatternRules
) -> list[LinearPlan]:
    """A plan for each linear of ``model``, in the order of its parameters."""
    aliases: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(parameter_name)
    plans: list[LinearPlan] = []
    reached = set()
    for parameter_name, parameter in model.named_parameters():
        role = trace.roles.get(parameter_name)
        if role is None:
            continue
        reached.add(id(parameter))
        layer = _layer_name(aliases[id(parameter)], role)
        layout = common_layout(role.reads, tuple(parameter.shape)) if role.reads else ""
        about = (
            layer, parameter_name, _shape(parameter, layout), tuple(dict.fromkeys(role.scopes)),
            parameter.numel() * parameter.element_size(),
        )  # fmt: skip
        pattern, reason = rules.select(layer)
        if pattern is not None:
            reason = _why_dense(parameter, role, layout, pattern, config)
            reason = reason or _why_not_here(model, aliases[id(parameter)])
        if reason or pattern is None or isinstance(layout, str):
            plans.append(DensePlan(*about, reason=reason))
        else:
            rows = tuple(sorted({(r.stop - r.start) // r.groups for r in role.reads}))
            plans.append(SparsePlan(*about, pattern=pattern, layout=layout, rows=rows))
    plans += _unreached(model, reached, rules)
    return plans + (_unknown(model, reached) if trace.untraced_because else [])


def _shape(parameter: nn.Parameter, layout: Layout | str) -> tuple[int, ...]:
    if isinstance(layout, str):
        return tuple(parameter.shape)
    stack = (layout.stack,) if layout.stack > 1 else ()
    return (*stack, layout.d_out, layout.d_in)


def _unreached(model: nn.Module, reached: set[int], rules: PatternRules) -> list[DensePlan]:
    """Plans of the linear modules whose weight no linear of the trace uses."""
    plans = []
    for name, module in linear_modules(model).items():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in reached:
            continue
        rules.select(name)
        why = "its weight is computed, not a parameter"
        if weight is not None:
            why = "the traced forward doesn't use it"
        computed = getattr(module, "weight", None) if weight is None else weight
        shape = tuple(computed.shape) if isinstance(computed, Tensor) else ()
        size = computed.numel() * computed.element_size() if isinstance(computed, Tensor) else 0
        plans.append(DensePlan(name, "", shape, (), size, why))
    return plans


def _unknown(model: nn.Module, reached: set[int]) -> list[LinearPlan]:
    """Plans of the matrices in modules outside ``torch.nn``, for a model that was not traced.

    They may be linears, such as stacks of experts, but their use is unknown.
    """
    why = "the model was not traced, so the use of this parameter isn't known"
    plans: list[LinearPlan] = []
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn."):
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2 or id(parameter) in reached:
                continue
            name = f"{path}.{attribute}" if path else attribute
            size = parameter.numel() * parameter.element_size()
            plans.append(DensePlan(name, "", tuple(parameter.shape), (), size, why))
    return plans


def _layer_name(aliases: list[str], role: WeightRole) -> str:
    """The name of the layer: for a shared parameter, the name under which a linear uses it."""
    names = [alias.removesuffix(".weight") for alias in aliases]
    return next((name for name in names if name in role.scopes), names[0])


def _why_dense(
    parameter: nn.Parameter,
    role: WeightRole,
    layout: Layout | str,
    pattern: Pattern,
    config: SlopeConfig,
) -> str:
    """The first reason why a weight stays dense, or ""."""
    others = ", ".join(dict.fromkeys(role.other_uses))
    if not role.reads:
        return f"its weight is used through {others}"
    if others:
        return f"shared: its weight is also used by {others}"
    if isinstance(layout, str):
        return layout
    if config.skip_head and role.makes_output:
        return "output head (skip_head)"
    if config.skip_router and role.chooses:
        return "a router: its output is ranked to choose something (skip_router)"
    if config.skip_first and role.reads_embeddings:
        return "fed directly by the embeddings (skip_first)"
    if config.skip_first and role.reads_input:
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
    """The reason why the modules of a weight cannot get its new attributes, or ""."""
    for alias in aliases:
        path, _, attribute = alias.rpartition(".")
        owner = model.get_submodule(path)
        for name in (values_name(attribute), sparse_name(attribute)):
            if hasattr(owner, name):
                return f"its module has a {name} of its own"
    return ""


def layer_rank(config: SlopeConfig, plan: SparsePlan) -> int | None:
    """Returns the rank of the adapter of one layer, or None without adapters.

    Raises:
        ArgumentError: the rank is larger than the layer.
    """
    asked = config.adapter_rank
    if asked is None:
        return None
    d_out, d_in = plan.shape[-2:]
    rank = asked if isinstance(asked, int) else max(1, round(asked * d_in))
    if rank > min(d_out, d_in):
        raise ArgumentError(
            f"adapter_rank={asked!r} is rank {rank} for {plan.name}, which is only "
            f"(d_out, d_in) = ({d_out}, {d_in}); at most {min(d_out, d_in)} is allowed there. "
            "Use a smaller rank, or a float for a fraction of each layer's width."
        )
    return rank


def nothing_to_do(plans: list[LinearPlan], untraced_because: str) -> str:
    """The error message for a model without a linear that can be sparse."""
    if not plans:
        found = "No linear was found in the model."
    else:
        reasons = (
            f"{plan.name or '(the model)'}: {plan.reason}"
            for plan in plans
            if isinstance(plan, DensePlan)
        )
        found = "No linear of the model can be sparse: " + "; ".join(reasons)
    how = f" The model was not traced ({untraced_because})." if untraced_because else ""
    return (
        f"{found}.{how} To prune more linears, change skip_first, skip_head, skip_router or "
        "sparsity."
    )
