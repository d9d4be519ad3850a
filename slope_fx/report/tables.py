"""What ``explain`` and ``preview`` report, as data and as a table."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from tabulate import tabulate

PRODUCTS = {
    "sparse_linear": "forward",
    "sparse_input_grad": "input gradient",
    "sparse_weight_grad": "weight gradient",
}
"""The products of a sparse linear, by the op that computes them."""


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
    for name in PRODUCTS.values():
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
