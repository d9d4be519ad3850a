"""Tensor parallelism: ``parallelize_module`` splits all parts of a sparse layer together.

``ColwiseParallel`` and ``RowwiseParallel`` of torch split the parameters of an ``nn.Linear`` one by
one, and would split the masks and the adapter of a sparse layer wrongly. This module patches the
method of both styles that splits a layer:

==============  ===============  ===================  =========  ==========
style           values, masks    adapter: A, B        bias       split
==============  ===============  ===================  =========  ==========
Colwise         Shard(0)         Replicate, Shard(0)  Shard(0)   d_out
Rowwise         Shard(1)         Shard(1), Replicate  Replicate  d_in
==============  ===============  ===================  =========  ==========
"""

import functools
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from slope_fx.errors import StateError, UnsupportedError
from slope_fx.ops.sharding import columns_split, rows_split
from slope_fx.sparse.optimizers import watch
from slope_fx.sparse.weight import SparseWeight


def split(
    module: nn.Module, attribute: str, mesh: DeviceMesh, dim: int, source: int | None = 0
) -> None:
    """Split the values, the masks and the adapter of a layer over a mesh with one dimension.

    Args:
        module: the layer, changed in place.
        attribute: the name of its weight.
        mesh: the ranks.
        dim: 0 to split the outputs of the layer, 1 to split its inputs.
        source: the rank of the mesh whose data is split, as ``src_data_rank`` of
            ``distribute_tensor``.

    Raises:
        UnsupportedError: the width can't be split into equal parts of whole groups.
        StateError: the layer is sharded already.
    """
    sparse: SparseWeight = getattr(module, f"{attribute}_sparse")
    if not isinstance(sparse, SparseWeight):
        raise StateError(
            f"{sparse.name} is of a frozen model, which parallelize_module can't split. Split the "
            "compiled model, before slope_fx.freeze."
        )
    check_split(sparse, dim, mesh.size())
    across: tuple[Placement, ...] = (Replicate(), Shard(0)) if dim == 0 else (Shard(1), Replicate())
    placements = {
        "forward_bits": Shard(dim),
        "backward_bits": Shard(dim),
        "lora_A": across[0],
        "lora_B": across[1],
    }
    replaced = []
    places: list[tuple[nn.Module, str, Placement]] = [(module, f"{attribute}_values", Shard(dim))]
    places += [(sparse, name, placement) for name, placement in placements.items()]
    for owner, name, placement in places:
        whole = owner._parameters.get(name)  # a layer may have no adapter
        if whole is None:
            continue
        part = nn.Parameter(
            distribute_tensor(whole, mesh, [placement], src_data_rank=source),
            requires_grad=whole.requires_grad,
        )
        owner._parameters[name] = part
        replaced.append((whole, part))
    sparse.parts = (mesh.size(), 1) if dim == 0 else (1, mesh.size())
    sparse.note_write()
    watch([pair for pair in replaced if pair[0].requires_grad], by="parallelize_module")


def check_split(sparse: SparseWeight, dim: int, parts: int) -> None:
    """Check that a layer can be split into a number of parts; errors as of :func:`split`."""
    name, n, m = sparse.name, sparse.n, sparse.m
    if isinstance(sparse.values, DTensor):
        raise StateError(
            f"{name} is sharded already ({sparse.values.placements}), by fully_shard or another "
            "parallelize_module. Call parallelize_module once, and before fully_shard."
        )
    if sparse.stack > 1:
        raise UnsupportedError(
            f"{name} is a stack of {sparse.stack} weights, which tensor parallelism can't split. "
            "Take it out of the plan, or keep it dense with sparsity={...: None}."
        )

    def fits(count: int) -> bool:
        if dim == 0:
            return rows_split(sparse.d_out, m, count)
        return columns_split(sparse.d_in, n, m, count)

    if fits(parts):
        return
    width, what = (sparse.d_out, "output") if dim == 0 else (sparse.d_in, "input")
    style = "ColwiseParallel" if dim == 0 else "RowwiseParallel"
    unit = f"whole groups of {m}" + ("" if dim == 0 else " and whole bytes of both masks")
    allowed = [count for count in range(1, width // m + 1) if fits(count)]
    sizes = f"Allowed for it are meshes of {_listed(allowed)}" if allowed else "No mesh fits it"
    raise UnsupportedError(
        f"{name} (d_out, d_in) = ({sparse.d_out}, {sparse.d_in}), {n}:{m}: {style} splits its "
        f"{what} width {width} into {parts} parts, which must be equal, of {unit}. {sizes}. Take "
        "the layer out of the plan, or keep it dense with sparsity={...: None}."
    )


def _listed(sizes: list[int]) -> str:
    return " or ".join(str(size) for size in sizes) + (" ranks" if sizes != [1] else " rank")


def _install(style: type[ColwiseParallel] | type[RowwiseParallel], dim: int) -> None:
    original = style._partition_linear_fn

    @functools.wraps(original)
    def partition(self: Any, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if isinstance(module, SparseWeight):
            return  # split with its layer
        kind = getattr(type(module), "_slope_kind", None)
        if kind is None or not kind.attributes:
            original(self, name, module, device_mesh)
            return
        source = getattr(self, "src_data_rank", 0)
        for attribute in kind.attributes:
            split(module, attribute, device_mesh, dim, source)
        bias_is: Placement = Shard(0) if dim == 0 else Replicate()
        for key, rest in list(module._parameters.items()):
            if rest is not None and not isinstance(rest, DTensor):
                bias: Tensor = distribute_tensor(rest, device_mesh, [bias_is], src_data_rank=source)
                module._parameters[key] = nn.Parameter(bias, requires_grad=rest.requires_grad)

    style._partition_linear_fn = partition  # type: ignore[method-assign]


_install(ColwiseParallel, 0)
_install(RowwiseParallel, 1)
