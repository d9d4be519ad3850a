"""``explain``: the report on the linears of a compiled model."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from slope_fx.backend.rewriting import nothing_gains
from slope_fx.frozen.install import sparse_places
from slope_fx.hub import takes_cache
from slope_fx.kernels.cpu.routes import NAMES
from slope_fx.kernels.engines import kept_bytes
from slope_fx.kernels.packing import packed_width
from slope_fx.kernels.selection import Choice, Problem, gain
from slope_fx.methods import Dense, Method, Slope, method_of
from slope_fx.ops.dispatch import local
from slope_fx.ops.frozen import why_not_native
from slope_fx.planning.plan import DensePlan, LinearPlan, SparsePlan
from slope_fx.planning.trace import linear_modules
from slope_fx.record import Record, record_of, sparse_weights
from slope_fx.report.tables import PRODUCTS, Explanation, LinearReport, ProductReport
from slope_fx.sparse.parts import Choices
from slope_fx.sparse.weight import SparseWeight


def explain(model: nn.Module) -> Explanation:
    """Returns a report on each linear of a compiled model.

    The report gives the pattern, engines and sizes of a sparse linear, and the reason why a
    linear is dense.

    Args:
        model: the object that :func:`slope_fx.compile` returned.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
    """
    record = record_of(model)
    if record.frozen is not None:
        return explain_frozen(model, record)
    weights = sparse_weights(model)
    notes = []
    if record.untraced_because:
        notes.append(
            f"The model was not traced ({record.untraced_because}): the linears are its nn.Linear "
            "and Conv1D modules, and the first and the last are those in module order."
        )
    if line := _method(record, weights):
        notes.append(line)
    met: dict[tuple[int, int, int, int], Choices] = {}
    for plan in record.plans:
        weight = weights.get(plan.name)
        if weight is not None and isinstance(plan, SparsePlan):
            for rows in plan.rows:
                size = (rows, weight.d_in, weight.n, weight.m)
                met[size] = Choices(_choices(weight, [rows]))
    trained = any(gain(choices.items(), training=True) for choices in met.values())
    if line := nothing_gains(met, trained):
        notes.append(line)
    if line := _regions(model, record):
        notes.append(line)
    reports = [_report(model, plan, weights.get(plan.name)) for plan in record.plans]
    reports += _added(model, record)
    return Explanation(tuple(reports), "\n".join(notes))


def explain_frozen(model: nn.Module, record: Record) -> Explanation:
    """The report on a frozen model."""
    frozen, weights = record.frozen, sparse_weights(model)
    assert frozen is not None
    expanded = _expanded(model, compiled=record.settings.backend is not None)
    reports = []
    for plan in record.plans:
        weight: Any = weights.get(plan.name)
        if weight is None or not isinstance(plan, SparsePlan):
            reports.append(report_dense(_as_it_is_now(model, plan)))
            continue
        # Beside a dense weight in the dtype of the values; of codes, in 16 bits.
        size = 2 if frozen.group else weight.values.element_size()
        tensors = [weight.values, *(p for p in weight.parameters() if p is not None)]
        before = math.prod(plan.shape) * size
        after = sum(tensor.nbytes for tensor in tensors)
        pairs = weight.form[6:]
        routes = tuple(
            (tokens, NAMES[route]) for tokens, route in zip(pairs[::2], pairs[1::2], strict=True)
        )
        if weight.values.device.type != "cpu" or why_not_native():
            routes = ((0, "engines"),)
        reports.append(
            LinearReport(
                plan.name, "sparse", plan.shape, str(plan.pattern), (), weight.rank,
                expanded.get(plan.name, ""), before, after, before, after, routes=routes,
            )
        )  # fmt: skip
    group = f", a scale for each {frozen.group}" if frozen.group else ""
    notes = [f"Frozen, for inference: {frozen.values} values{group}."]
    if expanded:
        some = ", ".join(list(expanded)[:3]) + (" and so on" if len(expanded) > 3 else "")
        what = "layer reads its" if len(expanded) == 1 else "layers read their"
        where = " outside of compiled code" if record.settings.backend is not None else ""
        notes.append(f"{len(expanded)} {what} dense weight{where}: {some}.")
    return Explanation(tuple(reports), "\n".join(notes))


def _expanded(model: nn.Module, *, compiled: bool) -> dict[str, str]:
    """The frozen layers whose forward reads a dense weight, each with the reason."""
    found = {}
    for weight, places in sparse_places(model).items():
        for module, attribute in places:
            kind: Any = getattr(type(module), "_slope_kind")  # noqa: B009
            if kind.forward is not None:
                continue
            reason = f"{kind.base.__name__} reads {attribute}, which is made at each call"
            if compiled:  # by the pass freeze_linears
                reason += ", but in compiled code, where the product is sparse"
            found[weight.name] = reason
    return found


def _method(record: Record, weights: Mapping[str, SparseWeight]) -> str:
    """The line about a method other than the default, or ""."""
    method = method_of(record.config.method)
    if isinstance(method, (Slope, Dense)):
        return ""
    line = f'method="{method.name}" ({method.source})'
    if not method.compressed:
        line += (
            ": the dense weights are stored and trained, so the bytes are those of dense weights "
            "and masks; the forward product is sparse. slope_fx.compress_(model) ends it."
        )
    first = next(iter(weights.values()), None)
    if first is not None and first.phase.fading and first.factor is not None:
        line += f" The pruned part takes part with factor {float(first.factor):g}: dense products."
    return line


def _choices(weight: SparseWeight, rows: Iterable[int]) -> list[tuple[Problem, Choice]]:
    """The engines that were chosen for the products of a weight.

    Args:
        weight: the weight.
        rows: the numbers of rows of the weight that a product reads.
    """
    down, across = weight.parts  # a rank computes the products of its part
    size, rows = (weight.d_in // across, weight.n, weight.m), [count // down for count in rows]
    return [
        (problem, choice)
        for problem, choice in weight.choices.items()
        if problem.d_out in rows and (problem.d_in, problem.n, problem.m) == size
    ]


def _regions(model: nn.Module, record: Record) -> str:
    """The line about the compiled regions; "" if the model is compiled as one graph."""
    if record.settings.backend is None or record.regions.whole:
        return ""
    paths, kinds = record.regions.paths, len(set(record.regions.kinds))
    line = (
        f"Compiled one by one: {len(paths)} modules, {paths[0]} and so on, with {kinds} "
        f"{'graph' if kinds == 1 else 'graphs'} among them."
    )
    if record.settings.region == "auto" and takes_cache(model):
        line += (
            " In training, the model is called with use_cache=False. For calls with a cache it is "
            "compiled as a whole."
        )
    return line


def _report(model: nn.Module, plan: LinearPlan, weight: SparseWeight | None) -> LinearReport:
    if weight is None or not isinstance(plan, SparsePlan):
        return report_dense(_as_it_is_now(model, plan))
    values = weight.values
    # The element size of the current dtype, which a cast of the model changes.
    return report_sparse(
        plan,
        weight.method,
        weight.rank,
        values.element_size(),
        products=product_reports(_choices(weight, plan.rows)),
        reason=weight.expanded_because or "",
        operand_bytes=kept_bytes(local(values)),
    )


def _as_it_is_now(model: nn.Module, plan: LinearPlan) -> DensePlan:
    """The plan of a linear without a sparse weight. If its layer was replaced, a new plan."""
    parameter = _parameter(model, plan)
    if isinstance(plan, DensePlan) and (parameter is not None or not plan.parameter_name):
        return plan
    about = (plan.name, plan.parameter_name)
    if parameter is None:
        reason = "its layer was removed, moved or replaced after compile"
        return DensePlan(*about, plan.shape, plan.scopes, 0, reason)
    size = parameter.numel() * parameter.element_size()
    reason = "its layer was replaced after compile"
    return DensePlan(*about, tuple(parameter.shape), plan.scopes, size, reason)


def _parameter(model: nn.Module, plan: LinearPlan) -> nn.Parameter | None:
    """The parameter of a plan, or None if the model no longer has it."""
    try:
        return model.get_parameter(plan.parameter_name)
    except AttributeError:
        return None


def _added(model: nn.Module, record: Record) -> list[LinearReport]:
    """The reports on linear modules that were added after ``compile``."""
    known = {plan.name for plan in record.plans} | {plan.parameter_name for plan in record.plans}
    # A wrapper such as torch's checkpoint_wrapper changes the names of the layers in it.
    planned = {id(_parameter(model, p)) for p in record.plans if isinstance(p, DensePlan)}
    sparse = {id(weight.values) for weight in sparse_weights(model).values()}
    reports = []
    for name, module in linear_modules(model).items():
        weight = module._parameters.get("weight")
        held = weight is None or any(id(p) in sparse for p in module.parameters())
        if weight is None or held or id(weight) in planned:
            continue
        if name in known or f"{name}.weight" in known:
            continue
        size = weight.numel() * weight.element_size()
        why = "it was added after compile"
        plan = DensePlan(name, f"{name}.weight", tuple(weight.shape), (), size, why)
        reports.append(report_dense(plan))
    return reports


def report_dense(plan: DensePlan) -> LinearReport:
    """The report on a dense linear."""
    size = plan.bytes_dense
    state = 2 * size + 8 * math.prod(plan.shape) if size else 0  # 0: its layer was removed
    return LinearReport(
        plan.name, "dense", plan.shape, None, (), None, plan.reason, size, size, state, state
    )


def report_sparse(
    plan: SparsePlan,
    method: Method,
    rank: int | None,
    size: int,
    *,
    products: tuple[ProductReport, ...] = (),
    reason: str = "",
    operand_bytes: int = 0,
) -> LinearReport:
    """The report on a sparse linear.

    Args:
        plan: plan of the linear.
        method: how the weight is stored and trained.
        rank: rank of the adapter, or None without an adapter.
        size: size of an element in bytes.
        products, reason, operand_bytes: as in :class:`LinearReport`.
    """
    layout, pattern, count = plan.layout, plan.pattern, math.prod(plan.shape)
    rows, width = layout.stack * layout.d_out, layout.d_in * pattern.n // pattern.m
    masks = rows * (packed_width(layout.d_in) + packed_width(width))
    adapter = (rank or 0) * (rows + layout.stack * layout.d_in)
    trained = math.prod(method.shape(rows, layout.d_in, pattern)) + adapter
    kept = method.nbytes(rows, layout.d_in, pattern, size) + adapter * size
    return LinearReport(
        name=plan.name,
        kind="sparse",
        shape=plan.shape,
        pattern=str(pattern),
        products=products,
        rank=rank,
        reason=reason,
        bytes_before=count * size,
        bytes_after=kept + masks,
        state_before=count * (2 * size + 8),
        state_after=kept + trained * (size + 8) + masks,
        operand_bytes=operand_bytes,
    )


def product_reports(chosen: Iterable[tuple[Problem, Choice]]) -> tuple[ProductReport, ...]:
    """The reports on products, sorted by tokens (largest first), dtype and product."""
    reports: dict[tuple[object, ...], ProductReport] = {}
    # Of two choices for a product, the choice for a weight that trains comes last and counts.
    for problem, choice in sorted(chosen, key=lambda pair: pair[0].makes_operand):
        about = (PRODUCTS[problem.op], problem.tokens, problem.dtype, problem.threads)
        reports[about] = ProductReport(*about, choice.engine, choice.speedup)
    order = list(PRODUCTS.values())
    return tuple(
        sorted(reports.values(), key=lambda r: (-r.tokens, r.dtype, order.index(r.product)))
    )
