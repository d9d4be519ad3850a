"""DDP, FSDP2 and HSDP train as one process does: both phases, refreshes, adapters that add much."""

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import slope_fx
from parallel import alone, assert_same, compiled, together


def blocks_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def fsdp_blocks(model, mesh=None, **more):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, **more)
    return fully_shard(model, mesh=mesh, **more)


def fsdp_whole(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def fsdp_linears(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for weight in slope_fx.sparse_weights(model):
        fully_shard(model.get_submodule(weight), mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {
    "DDP": DistributedDataParallel,
    "DDP, static graph": lambda m: DistributedDataParallel(m, static_graph=True),
    "DDP, bucket views": lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True),
    "DDP, unused": lambda m: DistributedDataParallel(m, find_unused_parameters=True),
    "FSDP2": fsdp_blocks,
    "FSDP2, whole": fsdp_whole,
    "FSDP2, linears": fsdp_linears,
    "FSDP2, no reshard": lambda m: fsdp_blocks(m, reshard_after_forward=False),
    "HSDP": lambda m: fsdp_blocks(m, init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))),
}


def train(way, name, backend):
    return together(compiled(name, backend), WAYS[way])


_alone = {}


def reference(world, name):
    if (world, name) not in _alone:
        _alone[world, name] = alone(world, compiled(name))
    return _alone[world, name]


@pytest.mark.parametrize(
    ("way", "name", "backend", "world"),
    [
        ("DDP", "gpt2", "aot_eager", 2),
        ("DDP, static graph", "gpt2", "aot_eager", 2),
        ("DDP, bucket views", "llama", "aot_eager", 2),
        ("DDP, unused", "llama", "aot_eager", 2),
        ("FSDP2", "gpt2", "aot_eager", 2),
        ("FSDP2", "llama", "aot_eager", 3),  # 32 rows are not whole groups of M rows for 3 ranks
        ("FSDP2, whole", "llama", "aot_eager", 2),
        ("FSDP2, linears", "gpt2", "aot_eager", 2),
        ("FSDP2, no reshard", "gpt2", "aot_eager", 2),
        ("HSDP", "llama", "aot_eager", 4),
    ],
)
def test_equal_to_one_process(ranks, way, name, backend, world):
    want = reference(world, name)
    for got in ranks.run(world, train, way, name, backend):
        assert_same(got, want)
