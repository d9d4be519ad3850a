"""``preview``: the report on a model that is not compiled, from its configuration."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from typing_extensions import Unpack

from slope_fx.checkpoints.loading import load_pretrained
from slope_fx.checkpoints.manifest import MANIFEST, Manifest, read_manifest
from slope_fx.errors import ArgumentError, ArgumentWarning, NoEligibleLinearError, first_line
from slope_fx.hub import class_of, config_of
from slope_fx.kernels.selection import PRODUCTS, Problem, Request, chosen
from slope_fx.methods import method_of
from slope_fx.planning.config import ConfigOptions, SlopeConfig, Sparsity, parse_dtype
from slope_fx.planning.patterns import PatternRules
from slope_fx.planning.plan import (
    DensePlan,
    SparsePlan,
    layer_rank,
    nothing_to_do,
    plan_linears,
    sparse_plans,
    values_name,
)
from slope_fx.planning.trace import trace
from slope_fx.report.explain import explain, product_reports, report_dense, report_sparse
from slope_fx.report.sharding import check_world_size, sharding
from slope_fx.report.tables import Explanation, LinearReport, ProductReport

TOKENS = 1024
"""Products are measured for so many tokens by default."""
MOST_WIDTH = 2048
"""Products are measured on weights of at most this width. Wider weights have nearly the same
speedup, and their measurement takes seconds."""


def preview(
    source: str | os.PathLike[str],
    sparsity: Sparsity | SlopeConfig | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    tokens: int | None = None,
    measure: bool = True,
    world_size: int | None = None,
    **options: Unpack[ConfigOptions],
) -> Explanation:
    """Returns the report that ``explain`` would give for a transformers model after ``compile``.

    The weights are not needed: the model is built on the meta device and traced. For a checkpoint
    of slope_fx, the report describes the checkpoint. A frozen checkpoint is loaded, which measures
    its routes for all numbers of tokens.

    Args:
        source: a ``config.json``, a folder with a ``config.json``, a name on the hub, or a
            checkpoint that ``save_pretrained`` wrote.
        sparsity, options: as for :func:`slope_fx.compile`. None for ``sparsity`` is "2:4".
        dtype: dtype of the weights. None: the dtype of the configuration, or float32.
        tokens: number of tokens for which the products are measured; None for 1024.
        measure: whether to measure the products on this machine.
        world_size: number of ranks. The report then has a :class:`Sharding`: what a rank holds and
            sends if ``fully_shard`` shards each block and the model over so many ranks, beside the
            same of the dense model. No process group is needed.

    Raises:
        ArgumentError: the configuration does not exist, transformers has no model class for it,
            or an argument has a value that is not allowed.
        SlopeError: as for ``compile``.
    """
    if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
        raise ArgumentError(f"tokens={tokens!r}; allowed is a whole number from 1 up.")
    if world_size is not None:
        check_world_size(world_size)
    if unknown := [name for name in options if name not in ConfigOptions.__annotations__]:
        raise ArgumentError(
            f"there is no argument {unknown[0]!r}; there are "
            f"{', '.join(ConfigOptions.__annotations__)}."
        )
    if (Path(source) / MANIFEST).is_file():
        ignored = {"sparsity": sparsity, "dtype": dtype, **options}
        _tell_ignored(ignored, f"{source} is a sparse checkpoint, and what it holds is reported")
        return _of_checkpoint(Path(source), tokens, measure, world_size)
    if not measure:
        _tell_ignored({"tokens": tokens}, "nothing is measured")
    tokens = tokens or TOKENS
    config = SlopeConfig.of("2:4" if sparsity is None else sparsity, options)
    rules = PatternRules(config.sparsity)
    model = _meta_model(source, parse_dtype(dtype))
    traced = trace(model, None)
    plans = plan_linears(model, traced, config, rules)
    sparse = sparse_plans(plans)
    if not sparse:
        raise NoEligibleLinearError(nothing_to_do(plans, traced.untraced_because))
    first = next(model.parameters())
    products = _measured(sparse, first.dtype, tokens) if measure else {}
    ranks = {plan.name: layer_rank(config, plan) for plan in sparse}
    reports: list[LinearReport] = []
    for plan in plans:
        if isinstance(plan, SparsePlan):
            rank, met = ranks[plan.name], products.get(plan.name, ())
            size = first.element_size()
            reports.append(report_sparse(plan, method_of(config.method), rank, size, products=met))
        elif isinstance(plan, DensePlan):
            reports.append(report_dense(plan))
    notes = []
    if traced.untraced_because:
        notes.append(f"The model was not traced ({traced.untraced_because}).")
    if products:
        notes.append(_gains(reports, tokens))
    for key in rules.unmatched():
        notes.append(f"sparsity[{key!r}] matches no linear that an earlier key doesn't match.")
    shards = None
    if world_size is not None:
        shards = sharding(model, sparse, ranks, method_of(config.method), traced.graphs, world_size)
    return Explanation(tuple(reports), "\n".join(notes), shards)


def _tell_ignored(arguments: Mapping[str, object], why: str) -> None:
    for name, given in arguments.items():
        if given not in (None, False):
            warnings.warn(f"{name} has no effect: {why}.", ArgumentWarning, stacklevel=3)


def _of_checkpoint(
    folder: Path, tokens: int | None, measure: bool, world_size: int | None
) -> Explanation:
    manifest = read_manifest(folder)
    if manifest.inference is not None:
        ignored = {"tokens": tokens, "measure=False": not measure}
        _tell_ignored(ignored, f"{folder} is a frozen model, which measures its routes")
        if world_size is not None:
            raise ArgumentError(
                f"world_size={world_size}: {folder} is a frozen model, which is not sharded. "
                "Pass the checkpoint of a model that trains."
            )
        return explain(load_pretrained(folder, backend=None))
    sparse = sparse_plans(manifest.plans)
    dtype = _dtype_of(folder, manifest)
    if not measure:
        _tell_ignored({"tokens": tokens}, "nothing is measured")
    tokens = tokens or TOKENS
    products = _measured(sparse, dtype, tokens) if measure and dtype is not None else {}
    reports: list[LinearReport] = []
    for plan in manifest.plans:
        if isinstance(plan, SparsePlan):
            rank, met = manifest.sparse[plan.name].rank, products.get(plan.name, ())
            size = plan.bytes_dense // max(1, torch.Size(plan.shape).numel())
            method = method_of(manifest.config.method)
            reports.append(report_sparse(plan, method, rank, size, products=met))
        elif isinstance(plan, DensePlan):
            reports.append(report_dense(plan))
    active = sum(entry.adapter_active for entry in manifest.sparse.values())
    note = f"A sparse checkpoint; adapters take part in {active} of its layers."
    if not sparse:
        note = f'A checkpoint of method="{method_of(manifest.config.method).name}".'
    if products:
        note += f"\n{_gains(reports, tokens)}"
    shards = None
    if world_size is not None:
        ranks = {plan.name: manifest.sparse[plan.name].rank for plan in sparse}
        model, method = _meta_model(folder, dtype), method_of(manifest.config.method)
        shards = sharding(model, sparse, ranks, method, {}, world_size)
    return Explanation(tuple(reports), note, shards)


def _dtype_of(folder: Path, manifest: Manifest) -> torch.dtype | None:
    """The dtype of the values in a checkpoint. None: it has none, as of method "dense"."""
    name = next((name for name in manifest.tensors if name.endswith(values_name(""))), None)
    if name is None:
        return None
    with safe_open(folder / manifest.tensors[name], framework="pt") as file:
        return file.get_tensor(name).dtype


def _meta_model(source: str | os.PathLike[str], dtype: torch.dtype | None) -> nn.Module:
    """The model of a configuration, on the meta device."""
    config = config_of(source)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    kind = class_of(config)
    # The Auto classes have from_config; the model classes have the private _from_config.
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
    plans: list[SparsePlan], dtype: torch.dtype, tokens: int
) -> dict[str, tuple[ProductReport, ...]]:
    """The engines and speedups of each sparse linear on this machine, by the layer's name."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for plan in plans:
        n, m = plan.pattern.n, plan.pattern.m
        d_out, d_in = _capped(max(plan.rows), m), _capped(plan.shape[-1], m)
        request = Request(tokens, d_out, d_in, n, m, dtype, device)
        pairs = [(Problem.of(op, request), chosen(op, request)) for op in PRODUCTS]
        found[plan.name] = product_reports(pairs)
    return found


def _capped(width: int, m: int) -> int:
    return width if width <= MOST_WIDTH else MOST_WIDTH // m * m


def _gains(reports: list[LinearReport], tokens: int) -> str:
    gaining = [r for r in reports if r.products and _speedup(r) > 1]
    sparse = sum(r.kind == "sparse" for r in reports)
    return (
        f"{len(gaining)} of {sparse} sparse linears train faster than dense here, by all three "
        f"products at {tokens} tokens (measured on weights of at most {MOST_WIDTH} a side)."
    )


def _speedup(report: LinearReport) -> float:
    """The speedup of the three products together, which take nearly equal times when dense."""
    speedups = [p.speedup for p in report.products if p.speedup is not None]
    return len(speedups) / sum(1 / s for s in speedups) if speedups else 0.0
