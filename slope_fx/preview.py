"""What would become of a model, told from its configuration alone."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from slope_fx.checkpoints.manifest import MANIFEST, Manifest, read_manifest
from slope_fx.errors import (
    ArgumentError,
    IgnoredArgumentWarning,
    NoEligibleLinearError,
    first_line,
)
from slope_fx.explain import Explanation, LinearReport, ProductReport, products_of, report_linear
from slope_fx.hub import class_of, config_of
from slope_fx.kernels import selection
from slope_fx.patterns import Pattern, PatternRules
from slope_fx.plan import (
    AdapterRank,
    LinearPlan,
    Skips,
    check_adapter_rank,
    layer_rank,
    parse_dtype,
    plan_linears,
)
from slope_fx.trace import trace
from slope_fx.weights import values_name

MOST_WIDTH = 2048
"""Products are measured on weights of at most this width: what is gained hardly changes beyond,
and takes seconds to measure."""


def preview(
    source: str | os.PathLike[str],
    sparsity: str | Pattern | Mapping[str, str | Pattern | None] = "2:4",
    *,
    adapter_rank: AdapterRank = None,
    skip_first: bool = True,
    skip_head: bool = True,
    skip_router: bool = True,
    dtype: str | torch.dtype | None = None,
    tokens: int = 1024,
    measure: bool = True,
) -> Explanation:
    """What ``compile`` would make of a model of transformers, without its weights.

    The model is made on the meta device, which takes no memory, and traced as ``compile`` would.
    Of a checkpoint of slope_fx it tells what it holds.

    Args:
        source: a ``config.json``, a folder that has one, a name on the hub, or a checkpoint
            that ``save_pretrained`` wrote.
        sparsity, adapter_rank, skip_first, skip_head, skip_router: as of :func:`slope_fx.compile`.
        dtype: of the weights; None for the configuration's, or float32.
        tokens: in a step, for which the products are measured.
        measure: time the products on this machine, to tell which layers gain.

    Raises:
        ArgumentError: there is no such configuration, or no model of transformers of its class.
        SlopeError: as ``compile`` does for the other arguments.
    """
    if not isinstance(tokens, int) or tokens < 1:
        raise ArgumentError(f"tokens={tokens!r}; allowed is a whole number from 1 up.")
    if (Path(source) / MANIFEST).is_file():
        ignored = {"sparsity": sparsity != "2:4", "adapter_rank": adapter_rank is not None,
                   "dtype": dtype is not None}  # fmt: skip
        for argument in (name for name, given in ignored.items() if given):
            warnings.warn(
                f"{argument} has no effect: {source} is a sparse checkpoint, of which it is told "
                "what it holds.",
                IgnoredArgumentWarning,
                stacklevel=2,
            )
        return _of_checkpoint(Path(source), tokens if measure else None)
    rules, rank = PatternRules(sparsity), check_adapter_rank(adapter_rank)
    model = _meta_model(source, parse_dtype(dtype))
    traced = trace(model, None)
    plans = plan_linears(model, traced, rules, Skips(skip_first, skip_head, skip_router))
    sparse = [plan for plan in plans if plan.pattern is not None]
    if not sparse:
        raise NoEligibleLinearError(f"No linear of {source} can be made {sparsity}.")
    size = next(model.parameters()).element_size()
    kind = next(model.parameters()).dtype
    products = _measured(sparse, kind, tokens) if measure else {}
    reports = tuple(
        report_linear(
            plan,
            layer_rank(rank, plan) if plan.pattern else None,
            size,
            products=products.get(plan.name, ()),
        )
        for plan in plans
    )
    notes = []
    if traced.untraced_because:
        notes.append(f"The model was not traced ({traced.untraced_because}).")
    if products:
        notes.append(_gains(reports, tokens))
    for key in rules.unmatched():
        notes.append(f"sparsity[{key!r}] matches no linear that an earlier key doesn't match.")
    return Explanation(reports, "\n".join(notes))


def _of_checkpoint(folder: Path, tokens: int | None) -> Explanation:
    manifest = read_manifest(folder)
    reports: list[LinearReport] = []
    sparse = [plan for plan in manifest.plans if plan.name in manifest.sparse]
    products = {} if tokens is None else _measured(sparse, _dtype_of(folder, manifest), tokens)
    for plan in manifest.plans:
        entry = manifest.sparse.get(plan.name)
        count = max(1, torch.Size(plan.shape).numel())
        reports.append(
            report_linear(
                plan, None if entry is None else entry.rank, plan.bytes_dense // count,
                products=products.get(plan.name, ()),
            )
        )  # fmt: skip
    active = sum(entry.adapter_active for entry in manifest.sparse.values())
    note = f"A sparse checkpoint; adapters take part in {active} of its layers."
    if tokens is not None:
        note += f"\n{_gains(tuple(reports), tokens)}"
    return Explanation(tuple(reports), note)


def _dtype_of(folder: Path, manifest: Manifest) -> torch.dtype:
    """Of the values of its sparse weights."""
    name = next(name for name in manifest.tensors if name.endswith(values_name("")))
    with safe_open(folder / manifest.tensors[name], framework="pt") as file:
        return file.get_tensor(name).dtype


def _meta_model(source: str | os.PathLike[str], dtype: torch.dtype | None) -> nn.Module:
    """The model that a configuration describes, on the meta device."""
    config = config_of(source)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    kind = class_of(config)
    # The Auto classes have it in public, the models' own for them.
    make = getattr(kind, "from_config", None) or kind._from_config
    try:
        with torch.device("meta"):
            model: nn.Module = make(config, dtype=dtype)
    except Exception as error:
        raise ArgumentError(
            f"source={str(source)!r} describes no model that transformers can make: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return model


def _measured(
    plans: list[LinearPlan], dtype: torch.dtype, tokens: int
) -> dict[str, tuple[ProductReport, ...]]:
    """What computes the products of each sparse linear here, and how much faster than dense."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for plan in plans:
        assert plan.pattern is not None
        n, m = plan.pattern.n, plan.pattern.m
        size = (_capped(max(plan.rows), m), _capped(plan.shape[-1], m))
        for op in selection.PRODUCTS:
            selection.choose(op, selection.Request(tokens, *size, n, m, dtype, device))
        met = products_of([size], plan.pattern)
        kind = str(dtype).removeprefix("torch.")
        found[plan.name] = tuple(p for p in met if p.dtype == kind)
    return found


def _capped(width: int, m: int) -> int:
    return width if width <= MOST_WIDTH else MOST_WIDTH // m * m


def _gains(reports: tuple[LinearReport, ...], tokens: int) -> str:
    gaining = [r for r in reports if r.products and _speedup(r) > 1]
    sparse = sum(r.kind == "sparse" for r in reports)
    return (
        f"{len(gaining)} of {sparse} sparse linears train faster than dense here, by all three "
        f"products at {tokens} tokens (measured on weights of at most {MOST_WIDTH} a side)."
    )


def _speedup(report: LinearReport) -> float:
    """Of the three products together: each takes the same time dense, nearly."""
    speedups = [p.speedup for p in report.products if p.speedup is not None]
    return len(speedups) / sum(1 / s for s in speedups) if speedups else 0.0
