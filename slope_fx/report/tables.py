"""The data classes and the table of the reports of ``explain`` and ``preview``."""

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
    """The engine that computes one product of a sparse linear.

    Attributes:
        product: "forward", "input gradient" or "weight gradient".
        tokens: rows of the input, rounded up to a power of two.
        dtype: dtype of the product.
        threads: number of threads for which the engine was chosen.
        engine: name of the engine.
        speedup: measured speedup over the dense product with a dense weight. None if the engine
            was named and not measured.
    """

    product: str
    tokens: int
    dtype: str
    threads: int
    engine: str
    speedup: float | None


@dataclass(frozen=True)
class LinearReport:
    """The report on one linear.

    Attributes:
        name: qualified name of the layer.
        kind: "sparse" or "dense".
        shape: shape of the weight: (d_out, d_in), or (stack, d_out, d_in).
        pattern: "N:M", or None for a dense linear.
        products: the products that have run so far, with their engines. Empty for a dense linear,
            and before the first run.
        rank: rank of the adapter, or None without an adapter.
        reason: the reason why a linear is dense, or why a sparse linear trained with its dense
            weight rebuilt; else "".
        bytes_before, bytes_after: size of the dense weight, and of the values, masks and adapter,
            in bytes.
        state_before, state_after: the same sizes with the gradients and the two fp32 moments of
            Adam.
        operand_bytes: size of the operands that an engine made from the weight and keeps until
            the weight changes, in bytes. The other sizes do not include it.
        routes: of a frozen layer, pairs (fewest tokens, route): how its product is computed from
            that number of tokens on. "stream" and "panels" read the sparse weight, "dense" expands
            it at each call. "engines": on another device, or without a C++ compiler, ``selection``
            chooses.
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
    routes: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class RankBytes:
    """What one rank of a sharded model holds and receives, in bytes.

    A ring sends as many bytes as it receives.

    Attributes:
        values, masks, adapters, others: the shards of the pruned weights (whole if dense), of
            their masks and adapters, and of all other parameters.
        gradients: the shards of the gradients.
        moments: the two fp32 moments of AdamW.
        block: the largest block, gathered; 0 without blocks.
        rest: what is outside of the blocks, gathered. FSDP2 keeps it so from forward to backward.
        all_gather: received in the all-gathers of one step.
        reduce_scatter: received in the reduce-scatters of one step.
        refresh: received in one refresh of the backward masks, on the rank that receives most.
    """

    values: int
    masks: int
    adapters: int
    others: int
    gradients: int
    moments: int
    block: int
    rest: int
    all_gather: int
    reduce_scatter: int
    refresh: int

    @property
    def held(self) -> int:
        """All shards, gradients and moments."""
        weights = self.values + self.masks + self.adapters + self.others
        return weights + self.gradients + self.moments


@dataclass(frozen=True)
class Sharding:
    """The report on a model that ``fully_shard`` shards. ``str`` gives it as a table.

    Attributes:
        world_size: number of ranks.
        blocks: number of blocks that are sharded each for itself, ahead of the rest of the model.
        sparse_layers: number of sparse linears.
        split_layers: of these, the number whose ranks split groups of M rows, so that a refresh
            sends rows.
        dense: bytes of rank 0 for the dense model. No rank has more.
        sparse: the same for the sparse model while the adapters are idle.
        adapter: the same while they are active; None without adapters.
    """

    world_size: int
    blocks: int
    sparse_layers: int
    split_layers: int
    dense: RankBytes
    sparse: RankBytes
    adapter: RankBytes | None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Sharding":
        """The report from the result of ``dataclasses.asdict``."""
        sides = {
            side: RankBytes(**data[side]) if data[side] is not None else None
            for side in ("dense", "sparse", "adapter")
        }
        return cls(**{**data, **sides})

    def __str__(self) -> str:
        phases = [phase for phase in (self.sparse, self.adapter) if phase is not None]
        rows = []
        for attribute, label in _RANK_ROWS.items():
            before, *after = (getattr(side, attribute) for side in (self.dense, *phases))
            if not before and not any(after):
                continue
            cells = [_size(before)]
            for count in after:
                cells += [_size(count), f"{count / before:.3f}" if before else ""]
            rows.append((label, *cells))
        headers = ["rank 0", "dense", "sparse", "ratio", "adapters active", "ratio"]
        headers = headers[: 2 + 2 * len(phases)]
        aligned = ("left", *("right",) * (len(headers) - 1))
        table = tabulate(rows, headers, disable_numparse=True, colalign=aligned)
        how = f"fully_shard on each of {self.blocks} blocks and on the model"
        if not self.blocks:
            how = "fully_shard on the model, which has no repeated blocks"
        local = "Refreshes of the masks are local: each rank has whole groups of M rows."
        if self.split_layers:
            local = (
                f"Refreshes of the masks send rows at the edges of shards, in {self.split_layers} "
                f"of {self.sparse_layers} sparse layers; elsewhere each rank has whole groups of "
                "M rows."
            )
        return "\n".join(
            [
                f"Sharded over {self.world_size} ranks by FSDP2 ({how}):",
                "",
                table,
                "",
                "Rank 0 has the largest shards; no rank holds or receives more, but in a refresh. "
                "Bytes on the wire are in the dtypes of the weights. Blocks are gathered for "
                f"forward and again for backward. {local}",
            ]
        )


_RANK_ROWS = {
    "values": "weights of the pruned linears",
    "masks": "masks",
    "adapters": "adapters",
    "others": "all other parameters",
    "gradients": "gradients",
    "moments": "AdamW's moments, fp32",
    "held": "all of these",
    "block": "the largest block, gathered",
    "rest": "outside of the blocks, gathered",
    "all_gather": "received a step, all-gathers",
    "reduce_scatter": "received a step, reduce-scatters",
    "refresh": "received a refresh, at most",
}


@dataclass(frozen=True)
class Explanation:
    """The report on a model. ``str`` gives it as a table.

    Attributes:
        linears: a report on each linear.
        note: remarks about the whole model, or "".
        sharding: the report on its shards, or None.
    """

    linears: tuple[LinearReport, ...]
    note: str
    sharding: Sharding | None = None

    @property
    def frozen(self) -> bool:
        """Whether the model is frozen."""
        return any(linear.routes for linear in self.linears)

    @property
    def sparse(self) -> tuple[LinearReport, ...]:
        """The sparse linears."""
        return tuple(linear for linear in self.linears if linear.kind == "sparse")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return {
            "linears": [asdict(linear) for linear in self.linears],
            "note": self.note,
            "sharding": None if self.sharding is None else asdict(self.sharding),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Explanation":
        """The report from the result of :meth:`to_dict`."""
        linears = []
        for report in data["linears"]:
            products = tuple(ProductReport(**product) for product in report["products"])
            shape = tuple(report["shape"])
            routes = tuple((tokens, route) for tokens, route in report.get("routes", ()))
            new = {"shape": shape, "products": products, "routes": routes}
            linears.append(LinearReport(**{**report, **new}))
        sharding = data.get("sharding")
        if sharding is not None:
            sharding = Sharding.from_dict(sharding)
        return cls(tuple(linears), data["note"], sharding)

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
                ("trains expanded: " if r.kind == "sparse" and r.reason and not r.routes else "")
                + r.reason,
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
        groups = (("Sparse layers", self.sparse), ("All linears", self.linears))
        for title, group in groups if self.sparse else ():
            line = f"{title}: weights {_change([(r.bytes_before, r.bytes_after) for r in group])}"
            if not self.frozen:
                state = _change([(r.state_before, r.state_after) for r in group])
                line += f"; with gradients and Adam's moments {state}"
            lines.append(f"{line}.")
        if any(product.speedup is not None for r in self.sparse for product in r.products):
            lines.append(
                "engine: the engines of the forward product, the input gradient and the weight "
                "gradient, with their speedups over the dense products, measured on this machine."
            )
        operands = sum(r.operand_bytes for r in self.sparse)
        if operands:
            lines.append(
                f"Besides, engines keep {_size(operands)} of operands that they made of the "
                "weights, until the weights change."
            )
        if self.note:
            lines.append(self.note)
        if self.sharding is not None:
            lines += ["", str(self.sharding)]
        return "\n".join(lines)


def _engines(report: LinearReport) -> str:
    """The table cell with the engines for the largest number of tokens.

    If products ran in several dtypes, the cell prefers the dtype of the weight to the dtype of
    autocast.
    """
    if report.kind == "dense":
        return ""
    if report.routes:
        routes = [f"{route} from {tokens}" for tokens, route in report.routes[1:]]
        return ", ".join([report.routes[0][1], *routes])
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
