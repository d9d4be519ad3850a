"""Masks of sharded weights (DTensors, as of ``fully_shard``), and which shards FSDP2 gathers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from slope_fx.errors import UnsupportedError
from slope_fx.kernels.packing import packed_width

Choose = Callable[[Tensor, Tensor], Tensor]
"""Maps values and packed forward mask of whole groups of M rows to their backward mask."""


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded tensor; other tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def found_anywhere(bits: DTensor) -> bool:
    """Whether a sharded tensor has an element that is not zero.

    A rank looks at its own rows. Only if some rank has none, this is a collective.
    """
    found, mesh = bits.to_local().any(), bits.device_mesh
    for dim, placement in enumerate(bits.placements):
        along, size = getattr(placement, "dim", None), mesh.size(dim)
        if along is None or -(-bits.shape[along] // size) * (size - 1) < bits.shape[along]:
            continue
        number = found.int()
        dist.all_reduce(number, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        found = number.bool()
    return bool(found)


def refresh_sharded(
    values: DTensor, forward_bits: Tensor, backward_bits: Tensor, n: int, m: int, choose: Choose,
    *, compressed: bool = True,
) -> None:  # fmt: skip
    """Choose the backward mask of sharded values. Each rank chooses the mask of its own rows.

    A group of M rows that spans several ranks is completed with the rows of the others: at most
    M - 1 rows from each side. No rank gathers the weight.

    Args:
        values: (rows, d_in * N / M), or (rows, d_in), sharded in any way. Shards of the columns
            have whole groups.
        forward_bits: uint8 (rows, ceil(d_in / 8)), sharded as the values or whole.
        backward_bits: uint8 (rows, ceil(d_in * N / M / 8)), sharded as the values or whole. It is
            written.
        n, m: the N:M pattern.
        choose: chooses the backward mask.
        compressed: whether the values are the kept ones alone.

    Raises:
        UnsupportedError: a mask is sharded in another way than the values, or the columns are not
            sharded in whole groups of M inputs and whole bytes of the masks.
    """
    kept, forward = values.to_local(), local_part(forward_bits, values)
    width = kept.shape[1] if compressed else kept.shape[1] * n // m
    _check_columns(width, forward, local_part(backward_bits, values), n, m)
    own = slice(None)
    split = _split_groups(values, m)
    if split is not None:
        own, (kept, forward) = split.complete(kept, forward)
    bits = local_part(backward_bits, values)
    if len(kept):
        bits = choose(kept, forward)[own]
    _put_local(bits, backward_bits, values)


def put_mask(mask: Tensor, like: Tensor, choose: Callable[[Tensor], Tensor]) -> None:
    """Choose a mask of a weight, and write it. Each rank chooses that of its own part.

    Args:
        mask: the packed mask, sharded as the weight or whole. It is written.
        like: the weight. Shards of the columns have whole groups.
        choose: maps a part of the weight to its packed mask.
    """
    if not isinstance(like, DTensor):
        mask.copy_(choose(like.detach()))
        return
    part = like.to_local()
    _put_local(choose(part) if len(part) else local_part(mask, like), mask, like)


def _put_local(bits: Tensor, mask: Tensor, like: DTensor) -> None:
    """Write this rank's part of a mask that is sharded as ``like``, or whole on each rank."""
    if isinstance(mask, DTensor):
        mask.to_local().copy_(bits)
        return
    # Only bits are sent.
    sharded = DTensor.from_local(
        bits, like.device_mesh, like.placements, shape=mask.shape, stride=mask.stride()
    )
    mask.copy_(sharded.full_tensor())


def _check_columns(columns: int, forward: Tensor, backward: Tensor, n: int, m: int) -> None:
    widths = packed_width(columns * m // n), packed_width(columns)
    if columns % n or (forward.shape[1], backward.shape[1]) != widths:
        raise UnsupportedError(
            f"a shard has {columns} kept values a row, and {forward.shape[1]} and "
            f"{backward.shape[1]} bytes of the masks. Shard the rows (fully_shard's default), or "
            f"columns in whole groups of {m} inputs and whole bytes of both masks."
        )


def local_part(bits: Tensor, values: DTensor) -> Tensor:
    """The part of a mask for this rank's values. Nothing is sent.

    Raises:
        UnsupportedError: the mask is sharded in another way than the values.
    """
    if not isinstance(bits, DTensor):
        same = [Replicate()] * values.device_mesh.ndim
        bits = DTensor.from_local(bits.detach(), values.device_mesh, same, run_check=False)
        bits = bits.redistribute(placements=values.placements)
    if bits.device_mesh != values.device_mesh or bits.placements != values.placements:
        raise UnsupportedError(
            f"values are sharded as {values.placements} on {values.device_mesh}, and a mask as "
            f"{bits.placements} on {bits.device_mesh}. Shard both in the same way. Masks can stay "
            "whole, as ignored_params of fully_shard, only without tensor parallelism."
        )
    return bits.to_local()


@dataclass(frozen=True)
class _Split:
    """Rows that are split over the ranks of one mesh dimension, within groups of M.

    Attributes:
        group: the ranks.
        ends: the end of the rows of each rank.
        m: M.
    """

    group: dist.ProcessGroup
    ends: tuple[int, ...]
    m: int

    def _rows(self, rank: int) -> tuple[int, int]:
        return (self.ends[rank - 1] if rank else 0), self.ends[rank]

    def _lacking(self, rank: int) -> list[tuple[int, int]]:
        """The ranges of rows of the groups of a rank that other ranks have: before and after."""
        start, end = self._rows(rank)
        if start == end:
            return []
        return [(start - start % self.m, start), (end, end + -end % self.m)]

    def _sent(self, source: int, target: int) -> list[tuple[int, int]]:
        """The ranges of rows that one rank sends to another."""
        first, last = self._rows(source)
        ranges = [(max(a, first), min(b, last)) for a, b in self._lacking(target)]
        return [(a, b) for a, b in ranges if a < b and source != target]

    def complete(self, *tensors: Tensor) -> tuple[slice, list[Tensor]]:
        """The rows of all groups of this rank, and where its own rows are in them.

        This is a collective operation.

        Args:
            tensors: this rank's rows (rows, columns), of any dtypes.
        """
        me, ranks = dist.get_rank(self.group), range(len(self.ends))
        start, _ = self._rows(me)
        # One collective carries all tensors, as bytes.
        rows = torch.cat([t.contiguous().view(torch.uint8) for t in tensors], 1)
        parts = [rows[a - start : b - start] for to in ranks for a, b in self._sent(me, to)]
        counts = [[sum(b - a for a, b in self._sent(s, t)) for t in ranks] for s in ranks]
        sent = torch.cat(parts) if parts else rows[:0]
        got = rows.new_empty(sum(counts[s][me] for s in ranks), rows.shape[1])
        dist.all_to_all_single(
            got, sent.contiguous(), [counts[s][me] for s in ranks], counts[me], group=self.group
        )
        before = sum(counts[s][me] for s in ranks if s < me)
        whole = torch.cat([got[:before], rows, got[before:]])
        widths = [0, *accumulate(t.shape[1] * t.itemsize for t in tensors)]
        made = [
            whole[:, a:b].flatten().view(t.dtype).view(len(whole), t.shape[1])
            for t, a, b in zip(tensors, widths, widths[1:], strict=False)
        ]
        return slice(before, before + len(rows)), made


def _split_groups(values: DTensor, m: int) -> _Split | None:
    """How ranks split groups of M rows, or None if each rank has whole groups."""
    rows, mesh = values.shape[0], values.device_mesh
    # FSDP shards what other mesh dimensions (tensor parallelism) have sharded already.
    order = sorted(range(mesh.ndim), key=lambda dim: type(values.placements[dim]) is not Shard)
    found = None
    for dim in order:
        placement = values.placements[dim]
        if placement.is_replicate() or getattr(placement, "dim", None) != 0:
            continue
        size = mesh.size(dim)
        chunk = -(-rows // size)
        if chunk % m:
            ends = tuple(min(rows, chunk * (rank + 1)) for rank in range(size))
            found = _Split(mesh.get_group(dim), ends, m)
        rows = chunk
    return found


def reshard(model: nn.Module) -> None:
    """Let the modules in ``model`` have their sharded parameters, which are what training keeps.

    FSDP2 leaves whole parameters in a module after an evaluation, if it does not reshard them after
    forward. A write to those is lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reshard_around(layer: nn.Module) -> None:
    """Let one layer have its sharded parameters, as :func:`reshard` without the model."""
    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule) and any(
            parameter._module_info.module is layer
            for group in module._get_fsdp_state()._fsdp_param_groups
            for parameter in group.fsdp_params
        ):
            module.reshard()


def gather(model: nn.Module, factors: Iterable[nn.Parameter], wanted: bool) -> None:
    """Let FSDP2 gather the factors of adapters in each step, or not.

    FSDP2 gathers all parameters of a module, including adapters that take no part yet. Those stay
    sharded parameters of the model when their group does not gather them. There is no public way to
    say this; a group's list of parameters is what it gathers.

    Args:
        model: the model. Its modules are in their sharded state.
        factors: the factors.
        wanted: whether to gather them.
    """
    ids = {id(factor) for factor in factors}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:
            aside: list[Any] = group.__dict__.setdefault("_slope_fx_aside", [])
            if wanted:
                for param in aside:  # what lazy_init did for the others
                    param.reset_sharded_param()
                    param._init_extensions()
                    param.init_dtype_attrs(group.mp_policy)
                group.fsdp_params += aside
                aside.clear()
                continue
            idle = [p for p in group.fsdp_params if id(p.sharded_param) in ids]
            if len(idle) < len(group.fsdp_params):
                group.fsdp_params = [p for p in group.fsdp_params if p not in idle]
                aside += idle
