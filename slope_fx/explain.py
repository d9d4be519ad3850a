"""``explain``: what became of every linear, and why."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tabulate import tabulate
from torch import nn

from slope_fx.backend import nothing_gains
from slope_fx.compiler import Compilation, compilation_of, sparse_weights
from slope_fx.graphs import write_graphs
from slope_fx.hub import takes_cache
from slope_fx.kernels import selection
from slope_fx.kernels.engines import kept_bytes
from slope_fx.kernels.packing import packed_width
from slope_fx.passes import PassReport
from slope_fx.patterns import Pattern
from slope_fx.plan import LinearPlan
from slope_fx.trace import linear_modules
from slope_fx.weights import SparseWeight


@dataclass(frozen=True)
class ProductReport:
    """What computes one product of a sparse linear, and how that was found.

    Attributes:
        product: "forward", "input gradient" or "weight gradient".
        tokens: rows of the input, rounded up to a power of two.
        dtype: of the product.
        threads: that it was chosen for.
        engine: its name.
        speedup: measured, against the dense product with a dense weight; None if the engine
            was given and not measured.
    """

    product: str
    tokens: int
    dtype: str
    threads: int
    engine: str
    speedup: float | None


@dataclass(frozen=True)
class LinearReport:
    """One linear of a compiled model.

    Attributes:
        name: qualified name.
        kind: "sparse" or "dense".
        shape: (d_out, d_in), or (stack, d_out, d_in).
        pattern: "N:M", or None for dense.
        products: what computes its products, for each kind met so far; empty for dense
            and before the first run.
        rank: of its adapter, or None.
        reason: why it is dense; for a sparse one that trained with its dense weight
            rebuilt, why it did; else "".
        bytes_before, bytes_after: of its weight: dense, and now (values, masks, adapter).
        state_before, state_after: the same while training with Adam: weight, gradient
            and two fp32 moments.
        operand_bytes: what an engine keeps now that it made of the weight, to use again until
            the weight changes; in none of the others.
    """

    name: str
    kind: Literal["sparse", "dense"]
    shape: tuple[int, ...]
    pattern: str | None
    products: tuple[ProductReport, ...]
    rank: int | None
    reason: str
    bytes_before: int
    bytes_after: int
    state_before: int
    state_after: int
    operand_bytes: int = 0


@dataclass(frozen=True)
class Explanation:
    """The report on a model. Print it for a table; its fields are the same as data.

    Attributes:
        linears: a report for each linear.
        note: what there is to say of the model as a whole; may be "".
    """

    linears: tuple[LinearReport, ...]
    note: str

    @property
    def sparse(self) -> tuple[LinearReport, ...]:
        """The sparse linears."""
        return tuple(linear for linear in self.linears if linear.kind == "sparse")

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, fit for JSON."""
        return {"linears": [asdict(linear) for linear in self.linears], "note": self.note}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Explanation":
        """The explanation that :meth:`to_dict` gave ``data`` of."""
        linears = []
        for report in data["linears"]:
            products = tuple(ProductReport(**product) for product in report["products"])
            shape = tuple(report["shape"])
            linears.append(LinearReport(**{**report, "shape": shape, "products": products}))
        return cls(tuple(linears), data["note"])

    def __str__(self) -> str:
        rows = [
            (
                r.name,
                r.kind,
                "x".join(map(str, r.shape)),
                r.pattern or "",
                _engines(r),
                _size(r.bytes_before),
                _size(r.bytes_after) if r.kind == "sparse" else "",
                ("trains expanded: " if r.kind == "sparse" and r.reason else "") + r.reason,
            )
            for r in self.linears
        ]
        headers = ("linear", "kind", "d_out x d_in", "N:M", "engine", "before", "after", "reason")
        table = tabulate(
            rows,
            headers,
            disable_numparse=True,
            colalign=("left",) * 5 + ("right",) * 2 + ("left",),
        )
        lines = [table, "", f"{len(self.sparse)} of {len(self.linears)} linears are sparse."]
        for title, group in (("Sparse layers", self.sparse), ("All linears", self.linears)):
            lines.append(
                f"{title}: weights {_change([(r.bytes_before, r.bytes_after) for r in group])}; "
                f"with gradients and Adam's moments "
                f"{_change([(r.state_before, r.state_after) for r in group])}."
            )
        if any(product.speedup is not None for r in self.sparse for product in r.products):
            lines.append(
                "engine: what computes the forward product, the input and the weight gradient, and "
                "how many times faster than the dense product it was when measured here."
            )
        operands = sum(r.operand_bytes for r in self.sparse)
        if operands:
            lines.append(
                f"Besides, engines keep {_size(operands)} of operands that they made of the "
                "weights, until these change."
            )
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


def explain(model: nn.Module, *, graphs: bool | str | Path = False) -> Explanation:
    """What became of every linear of a compiled model.

    Args:
        model: what :func:`slope_fx.compile` returned.
        graphs: also write down what each pass did to each graph compiled so far, into this
            folder; True for ``slope_fx_graphs``. There is a folder for each graph, with its code
            as it was traced, after each pass, the differences, and a table of counts.

    Raises:
        NotCompiledError: ``model`` is not the object that ``compile`` returned.
    """
    record = compilation_of(model)
    weights = sparse_weights(model)
    notes = []
    if record.untraced_because:
        notes.append(
            f"The model was not traced ({record.untraced_because}): these are its nn.Linear and "
            "Conv1D modules, and first and last are by module order."
        )
    shapes = {
        (rows, weight.d_in, weight.n, weight.m)
        for plan in record.plans
        if (weight := weights.get(plan.name)) is not None
        for rows in plan.rows
    }
    trained = any(selection.gain(selection.choices(*shape), training=True) for shape in shapes)
    if line := nothing_gains(shapes, trained):
        notes.append(line)
    if line := _regions(model, record):
        notes.append(line)
    if graphs is not False:
        folder = Path("slope_fx_graphs" if graphs is True else graphs)
        notes.append(_graphs(write_graphs(model, folder), folder))
    reports = [_report(model, plan, weights.get(plan.name)) for plan in record.plans]
    reports += _added(model, record)
    return Explanation(tuple(reports), "\n".join(notes))


def _regions(model: nn.Module, record: Compilation) -> str:
    """What is compiled, if not the model as one graph."""
    if record.settings is None or record.regions.whole:
        return ""
    paths, kinds = record.regions.paths, len(set(record.regions.kinds))
    line = (
        f"Compiled one by one: {len(paths)} modules, {paths[0]} and so on, with {kinds} "
        f"{'graph' if kinds == 1 else 'graphs'} among them."
    )
    if record.region == "auto" and takes_cache(model):
        line += (
            " While it trains the model is called with use_cache=False; where a cache is used it "
            "is compiled as a whole."
        )
    return line


def _graphs(written: list[tuple[str, tuple[PassReport, ...]]], folder: Path) -> str:
    if not written:
        return f"No graph was compiled yet, so nothing is written to {folder}: run the model once."
    lines = [f"The steps of {len(written)} graphs are in {folder.absolute()}:"]
    for name, reports in written:
        counts = ", ".join(f"{r.name} {r.matches}" for r in reports if r.matches)
        lines.append(f"  {name}: {counts or 'no pass matched anything'}")
        lines += [f"    {r.name} matched none of {r.expected}" for r in reports if r.missed]
    return "\n".join(lines)


def _report(model: nn.Module, plan: LinearPlan, weight: SparseWeight | None) -> LinearReport:
    if weight is None:
        return report_linear(_as_it_is_now(model, plan), None, 0)
    values = weight.values
    # The sizes as they are, whatever dtype the model was moved to.
    return report_linear(
        plan,
        weight.rank,
        values.element_size(),
        products=_products(weight, plan.rows),
        reason=weight.expanded_because or "",
        operand_bytes=kept_bytes(values),
    )


def _as_it_is_now(model: nn.Module, plan: LinearPlan) -> LinearPlan:
    """The plan of a linear without a sparse weight: another one, if its layer was replaced."""
    try:
        parameter = model.get_parameter(plan.parameter_name)
    except AttributeError:
        parameter = None
    if plan.pattern is None and (parameter is not None or not plan.parameter_name):
        return plan
    reason = "its layer was replaced after compile"
    if parameter is None:
        reason = "its layer was removed, moved or replaced after compile"
    size = 0 if parameter is None else parameter.numel() * parameter.element_size()
    shape = plan.shape if parameter is None else tuple(parameter.shape)
    return dataclasses.replace(plan, pattern=None, shape=shape, reason=reason, bytes_dense=size)


def _added(model: nn.Module, record: Compilation) -> list[LinearReport]:
    """The linear modules that weren't there when the model was compiled."""
    known = {plan.name for plan in record.plans} | {plan.parameter_name for plan in record.plans}
    sparse = {id(weight.values) for weight in sparse_weights(model).values()}
    reports = []
    for name, module in linear_modules(model).items():
        weight = module._parameters.get("weight")
        held = weight is None or any(id(p) in sparse for p in module.parameters())
        if weight is None or held or name in known or f"{name}.weight" in known:
            continue
        plan = LinearPlan(
            name, f"{name}.weight", tuple(weight.shape), None, (), None,
            "it was added after compile", (), weight.numel() * weight.element_size(),
        )  # fmt: skip
        reports.append(report_linear(plan, None, 0))
    return reports


def report_linear(
    plan: LinearPlan,
    rank: int | None,
    size: int,
    *,
    products: tuple[ProductReport, ...] = (),
    reason: str = "",
    operand_bytes: int = 0,
) -> LinearReport:
    """The report on one linear, of which all but this follows from its plan.

    Args:
        plan: its fate; dense if it has no pattern.
        rank: of its adapter, or None.
        size: bytes of an element of a sparse weight.
        products, reason, operand_bytes: as in :class:`LinearReport`, for a sparse one.
    """
    count = math.prod(plan.shape)
    if plan.pattern is None or plan.layout is None:
        state = 2 * plan.bytes_dense + 8 * count
        return LinearReport(
            plan.name, "dense", plan.shape, None, (), None, plan.reason,
            plan.bytes_dense, plan.bytes_dense, state, state,
        )  # fmt: skip
    layout, pattern = plan.layout, plan.pattern
    rows, kept = layout.stack * layout.d_out, layout.d_in * pattern.n // pattern.m
    masks = rows * (packed_width(layout.d_in) + packed_width(kept))
    trained = rows * kept + (rank or 0) * (rows + layout.stack * layout.d_in)
    return LinearReport(
        name=plan.name,
        kind="sparse",
        shape=plan.shape,
        pattern=str(pattern),
        products=products,
        rank=rank,
        reason=reason,
        bytes_before=count * size,
        bytes_after=trained * size + masks,
        state_before=count * (2 * size + 8),
        state_after=trained * (2 * size + 8) + masks,
        operand_bytes=operand_bytes,
    )


_PRODUCTS = {
    "sparse_linear": "forward",
    "sparse_input_grad": "input gradient",
    "sparse_weight_grad": "weight gradient",
}


def _products(weight: SparseWeight, rows: tuple[int, ...]) -> tuple[ProductReport, ...]:
    # A choice depends on the size and the pattern of a weight alone, so all that was chosen
    # for such weights is what was, or would be, chosen for this one.
    return products_of([(part, weight.d_in) for part in rows], weight.pattern)


def products_of(sizes: Iterable[tuple[int, int]], pattern: Pattern) -> tuple[ProductReport, ...]:
    """What was chosen in this process for weights (d_out, d_in) of some sizes."""
    chosen = [c for size in sizes for c in selection.choices(*size, pattern.n, pattern.m)]
    reports = (
        ProductReport(
            _PRODUCTS[problem.op],
            problem.tokens,
            problem.dtype,
            problem.threads,
            choice.engine,
            choice.speedup,
        )
        for problem, choice in chosen
    )
    order = list(_PRODUCTS.values())
    return tuple(sorted(reports, key=lambda r: (-r.tokens, r.dtype, order.index(r.product))))


def _engines(report: LinearReport) -> str:
    """The engines for the largest number of tokens met, as one cell of the table.

    Of several dtypes, that of the weight comes before what autocast makes of it.
    """
    if report.kind == "dense":
        return ""
    if not report.products:
        return "(not run yet)"
    size = report.bytes_before // math.prod(report.shape)
    first = max(
        report.products,
        key=lambda p: (p.tokens, getattr(torch, p.dtype).itemsize == size),
    )
    met = {
        p.product: p for p in report.products
        if (p.tokens, p.dtype, p.threads) == (first.tokens, first.dtype, first.threads)
    }  # fmt: skip
    parts, last = [], ""
    for name in _PRODUCTS.values():
        product = met.get(name)
        if product is None:
            parts.append("-")
            continue
        if product.engine != last:
            parts.append(product.engine)
        if product.speedup is not None:
            parts.append(f"{product.speedup:.2f}x")
        last = product.engine
    return " ".join(parts)


def _size(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def _change(pairs: list[tuple[int, int]]) -> str:
    before, after = (sum(side) for side in zip(*pairs, strict=True))
    return f"{_size(before)} -> {_size(after)} ({after / before:.3f})"


__all__ = ["Explanation", "LinearReport", "explain"]
