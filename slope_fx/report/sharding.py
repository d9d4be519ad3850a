"""What each rank holds and sends if ``fully_shard`` shards a model."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from slope_fx.errors import ArgumentError
from slope_fx.kernels.packing import packed_width
from slope_fx.methods import Method
from slope_fx.planning.plan import SparsePlan
from slope_fx.planning.regions import repeated_blocks
from slope_fx.report.tables import RankBytes, Sharding


class _Tensor(NamedTuple):
    """A parameter.

    Attributes:
        kind: the field of :class:`RankBytes` that counts it.
        unit: path of the block with the parameter; "" outside of the blocks.
        itemsize: bytes of an element.
        trains: whether it has a gradient.
    """

    kind: str
    unit: str
    shape: tuple[int, ...]
    itemsize: int
    trains: bool = True

    def shard(self, world_size: int) -> int:
        """Number of elements of a rank's shard, padded to that of rank 0."""
        # fully_shard takes no scalars: they have to be tensors of one element.
        rows, *others = self.shape or (1,)
        return -(-rows // world_size) * math.prod(others)


def check_world_size(world_size: object) -> None:
    """Check a number of ranks.

    Raises:
        ArgumentError: it is no whole number from 1 up.
    """
    if not isinstance(world_size, int) or isinstance(world_size, bool) or world_size < 1:
        raise ArgumentError(
            f"world_size={world_size!r}; allowed is a whole number of ranks from 1 up, or None to "
            "leave out the report on shards."
        )


def sharding(
    model: nn.Module,
    plans: Iterable[SparsePlan],
    ranks: Mapping[str, int | None],
    method: Method,
    graphs: Mapping[str, int],
    world_size: int,
) -> Sharding:
    """The report on a model that ``fully_shard`` shards: each repeated block, then the model.

    Nothing is allocated and no process group is needed: a rank's shard is the part of the rows that
    ``torch.chunk`` gives it, and FSDP2 pads it to the size of the first part.

    Args:
        model: the dense model, on any device. It does not change.
        plans: plans of the sparse linears.
        ranks: the rank of the adapter of each, or None, by the layer's name.
        method: how the weights are stored and trained.
        graphs: module path -> number of its traced graph, to find the blocks. It may be empty.
        world_size: number of processes.
    """
    blocks = repeated_blocks(model, graphs)
    blocks -= {b for b in blocks if any(b.startswith(f"{outer}.") for outer in blocks)}
    pruned = {plan.parameter_name: plan for plan in plans}
    dense: list[_Tensor] = []
    sparse: list[_Tensor] = []
    for name, parameter in model.named_parameters():
        unit = next((block for block in blocks if name.startswith(f"{block}.")), "")
        plan, size = pruned.get(name), parameter.element_size()
        kind = "others" if plan is None else "values"
        was = _Tensor(kind, unit, tuple(parameter.shape), size, parameter.requires_grad)
        dense.append(was)
        sparse += [was] if plan is None else _parts(plan, ranks[plan.name], method, was)
    asleep = [tensor for tensor in sparse if tensor.kind != "adapters"]
    received = [0] * world_size
    split = 0
    for plan in pruned.values():
        lacking = _lacking_rows(plan.layout.stack * plan.layout.d_out, world_size, plan.pattern.m)
        split += any(lacking)
        row = _row_bytes(plan, method, model.get_parameter(plan.parameter_name).element_size())
        received = [total + rows * row for total, rows in zip(received, lacking, strict=True)]
    adapters = any(ranks.values())
    return Sharding(
        world_size=world_size,
        blocks=len(blocks),
        sparse_layers=len(pruned),
        split_layers=split,
        dense=_bytes(dense, dense, world_size, 0),
        sparse=_bytes(sparse, asleep, world_size, max(received)),
        adapter=_bytes(sparse, sparse, world_size, max(received)) if adapters else None,
    )


def _parts(plan: SparsePlan, rank: int | None, method: Method, was: _Tensor) -> list[_Tensor]:
    """The parameters that replace the dense parameter ``was``."""
    layout, pattern = plan.layout, plan.pattern
    rows = layout.stack * layout.d_out
    stored = method.shape(rows, layout.d_in, pattern)
    width = layout.d_in * pattern.n // pattern.m
    parts = [_Tensor("values", was.unit, stored, was.itemsize, was.trains)]
    for columns in (layout.d_in, width):
        parts.append(_Tensor("masks", was.unit, (rows, packed_width(columns)), 1, False))
    if rank is not None:
        for shape in ((layout.stack * rank, layout.d_in), (rows, rank)):
            parts.append(_Tensor("adapters", was.unit, shape, was.itemsize))
    return parts


def _bytes(
    held: Iterable[_Tensor], used: list[_Tensor], world_size: int, refresh: int
) -> RankBytes:
    """The bytes of rank 0.

    Args:
        held: the parameters.
        used: of these, the parameters that take part in a step.
        world_size, refresh: as in :class:`Sharding` and :class:`RankBytes`.
    """
    kept = dict.fromkeys(("values", "masks", "adapters", "others"), 0)
    for tensor in held:
        kept[tensor.kind] += tensor.shard(world_size) * tensor.itemsize
    units = {"": 0}
    gradients = moments = 0
    for tensor in used:
        elements = tensor.shard(world_size)
        units[tensor.unit] = units.get(tensor.unit, 0) + elements * tensor.itemsize
        gradients += tensor.trains * elements * tensor.itemsize
        moments += tensor.trains * elements * 8
    rest = units.pop("")
    # FSDP2 gathers a block for forward and again for backward, and the rest once.
    gathered = rest + 2 * sum(units.values())
    return RankBytes(
        **kept,
        gradients=gradients,
        moments=moments,
        block=world_size * max(units.values(), default=0),
        rest=world_size * rest,
        all_gather=(world_size - 1) * gathered,
        reduce_scatter=(world_size - 1) * gradients,
        refresh=refresh,
    )


def _row_bytes(plan: SparsePlan, method: Method, itemsize: int) -> int:
    """Bytes of one row of the values and of the forward mask, which a refresh needs."""
    width = plan.layout.d_in
    return method.nbytes(1, width, plan.pattern, itemsize) + packed_width(width)


@functools.cache
def _lacking_rows(rows: int, world_size: int, m: int) -> list[int]:
    """For each rank, the rows that other ranks have of the groups of M rows that it has a part of.

    Zeros if each rank has whole groups.
    """
    chunk = -(-rows // world_size)
    lacking = []
    for rank in range(world_size):
        start, end = min(rows, rank * chunk), min(rows, (rank + 1) * chunk)
        lacking.append(start % m + -end % m if start < end else 0)
    return lacking
