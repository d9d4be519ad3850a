"""The sharding rules of the ops: how each runs on DTensors, for each dimension of the mesh.

=============  =====================  ========================  ==================
rule           x                      values, masks             y
=============  =====================  ========================  ==================
replicated     Replicate              Replicate                 Replicate
columns        Replicate              Shard(0)                  Shard(-1)
rows           Shard(-1)              Shard(1)                  Partial
batch          Shard(i), i < dim - 1  Replicate                 Shard(i)
=============  =====================  ========================  ==================

A rule applies only where all shards are equal and whole: of M rows for a shard of rows, of M
columns and of whole bytes of both masks for a shard of columns. Other placements are redistributed
by DTensor. Stacks of weights are replicated. The kernels get local tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from slope_fx.ops import adapter, masks, sparse_linear, weights
from slope_fx.ops.groups import is_plain

Rule = tuple[list[Placement], list[Placement]]
"""Placements of the results, and of the tensors among the arguments."""

_WHOLE, _SUM = Replicate(), Partial()
_DOWN, _ACROSS = Shard(0), Shard(1)


def rows_split(rows: int, m: int, parts: int) -> bool:
    """Whether the rows (d_out) of a weight can be split into equal parts of whole groups."""
    return rows % (m * parts) == 0


def columns_split(d_in: int, n: int, m: int, parts: int) -> bool:
    """Whether the columns (d_in) can be split into equal parts of whole groups and mask bytes."""
    width, more = divmod(d_in, parts)
    return not (more or width % m or width % 8 or width * n // m % 8)


def _register(op: Any) -> Callable[[Callable[..., list[Rule]]], Callable[..., list[Rule]]]:
    made: Callable[..., Any] = register_sharding(op)
    return made


def _replicated(count: int) -> Rule:
    return [_WHOLE], [_WHOLE] * count


def _parts(spec: Any) -> int:
    """The number of parts if all dimensions of the mesh split the same dimension."""
    size: int = spec.mesh.size()
    return size


def _batches(x: Any) -> list[Placement]:
    """The shards of the dimensions of ``x`` that are not its features."""
    return [Shard(i) for i in range(len(x.shape) - 1)]


@_register(torch.ops.slope_fx.sparse_linear.default)
def _sparse_linear(
    x: Any, values: Any, forward: Any, backward: Any, bias: Any, n: int, m: int, groups: int = 1,
    offsets: Any = None, engine: str = "", input_engine: str = "", weight_engine: str = "",
    engines: str = "", master: Any = None,
) -> list[Rule]:  # fmt: skip
    more = [tensor for tensor in (bias, offsets, master) if tensor is not None]
    rules = [_replicated(4 + len(more))]
    if not is_plain(groups, offsets):
        return rules
    features, parts = Shard(len(x.shape) - 1), _parts(x)
    rules += [([b], [b, *[_WHOLE] * (3 + len(more))]) for b in _batches(x)]
    if rows_split(values.shape[0], m, parts):
        rules.append(([features], [_WHOLE, *[_DOWN] * (3 + len(more))]))
    if columns_split(x.shape[-1], n, m, parts):
        # DTensor divides a replicated bias by the number of parts.
        added = [_SUM] * (bias is not None) + [_ACROSS] * (master is not None)
        rules.append(([_SUM], [features, *[_ACROSS] * 3, *added]))
    return rules


@_register(torch.ops.slope_fx.sparse_input_grad.default)
def _sparse_input_grad(
    grad: Any, values: Any, forward: Any, backward: Any, n: int, m: int, groups: int = 1,
    offsets: Any = None, *names: str, **named: str,
) -> list[Rule]:  # fmt: skip
    rules = [_replicated(4 + (offsets is not None))]
    if not is_plain(groups, offsets):
        return rules
    features, parts = Shard(len(grad.shape) - 1), _parts(grad)
    rules += [([b], [b, *[_WHOLE] * 3]) for b in _batches(grad)]
    if rows_split(values.shape[0], m, parts):
        rules.append(([_SUM], [features, *[_DOWN] * 3]))
    if columns_split(values.shape[1] * m // n, n, m, parts):
        rules.append(([features], [_WHOLE, *[_ACROSS] * 3]))
    return rules


@_register(torch.ops.slope_fx.sparse_weight_grad.default)
def _sparse_weight_grad(
    grad: Any, x: Any, forward: Any, n: int, m: int, groups: int = 1, offsets: Any = None,
    *more: Any, **named: Any,
) -> list[Rule]:  # fmt: skip
    rules = [_replicated(3 + (offsets is not None))]
    if not is_plain(groups, offsets):
        return rules
    features, parts = Shard(len(x.shape) - 1), _parts(x)
    rules += [([_SUM], [b, b, _WHOLE]) for b in _batches(x)]
    if rows_split(grad.shape[-1], m, parts):
        rules.append(([_DOWN], [features, _WHOLE, _DOWN]))
    if columns_split(x.shape[-1], n, m, parts):
        rules.append(([_ACROSS], [_WHOLE, features, _ACROSS]))
    return rules


def _of_rows(count: int, first: Any, d_in: int, n: int, m: int, *, down: bool = True) -> list[Rule]:
    """The rules of an op of a weight and its masks, whose result is split as they are."""
    rules = [_replicated(count)]
    if down:
        rules.append(([_DOWN], [_DOWN] * count))
    if columns_split(d_in, n, m, _parts(first)):
        rules.append(([_ACROSS], [_ACROSS] * count))
    return rules


@_register(torch.ops.slope_fx.expand.default)
def _expand(
    values: Any, forward: Any, backward: Any, n: int, m: int, master: Any = None
) -> list[Rule]:
    return _of_rows(3 + (master is not None), values, values.shape[1] * m // n, n, m)


@_register([torch.ops.slope_fx.expand_grad.default, torch.ops.slope_fx.compress.default])
def _compress(dense: Any, forward: Any, n: int, m: int) -> list[Rule]:
    # A gradient that is a sum over the ranks stays one.
    summed: Rule = [_SUM], [_SUM, _WHOLE]
    return [*_of_rows(2, dense, dense.shape[1], n, m), summed]


@_register(torch.ops.slope_fx.magnitude_mask.default)
def _magnitude_mask(weight: Any, n: int, m: int) -> list[Rule]:
    return _of_rows(1, weight, weight.shape[1], n, m)


@_register(torch.ops.slope_fx.backward_mask.default)
def _backward_mask(values: Any, forward: Any, n: int, m: int) -> list[Rule]:
    down = rows_split(values.shape[0], m, _parts(values))
    return _of_rows(2, values, values.shape[1] * m // n, n, m, down=down)


@_register(torch.ops.slope_fx.add_adapter.default)
def _add_adapter(weight: Any, lora_a: Any, lora_b: Any, scale: float) -> list[Rule]:
    rules = [_replicated(3)]
    if lora_a.shape[0] == lora_b.shape[1]:  # not a stack
        rules.append(([_DOWN], [_DOWN, _WHOLE, _DOWN]))
        rules.append(([_ACROSS], [_ACROSS, _ACROSS, _WHOLE]))
    return rules


# The ops must be registered before their rules.
_ = adapter, masks, sparse_linear, weights
