"""DDP, FSDP2 and HSDP train as one process does: both phases, refreshes, adapters that add much."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
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


def fsdp_small_masks(model):
    """The masks are whole on each rank, and are not gathered."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    masks = {p for p in model.parameters() if not p.is_floating_point()}
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, ignored_params=masks)
    return fully_shard(model, mesh=mesh, ignored_params=masks)


class Within(torch.nn.Module):
    """A module of the user's around the compiled model."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        return self.inner(**inputs)


def ddp_checkpointing(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return DistributedDataParallel(model)


WAYS = {
    "DDP": DistributedDataParallel,
    "DDP, static graph": lambda m: DistributedDataParallel(m, static_graph=True),
    "DDP, bucket views": lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True),
    "DDP, unused": lambda m: DistributedDataParallel(m, find_unused_parameters=True),
    "DDP, made again": lambda m: DistributedDataParallel(DistributedDataParallel(m).module),
    "DDP, within": lambda m: DistributedDataParallel(Within(m)),
    "DDP, checkpointing": ddp_checkpointing,
    "FSDP2": fsdp_blocks,
    "FSDP2, whole": fsdp_whole,
    "FSDP2, linears": fsdp_linears,
    "FSDP2, no reshard": lambda m: fsdp_blocks(m, reshard_after_forward=False),
    "FSDP2, masks whole": fsdp_small_masks,
    "FSDP2, offload": lambda m: fsdp_blocks(m, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "HSDP": lambda m: fsdp_blocks(m, init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))),
}


def train(way, name, backend, micro_batches=1):
    return together(compiled(name, backend), WAYS[way], micro_batches=micro_batches)


_alone = {}


def reference(batches, name):
    if (batches, name) not in _alone:
        _alone[batches, name] = alone(batches, compiled(name))
    return _alone[batches, name]


CASES = [
    ("DDP", "gpt2", "aot_eager", 2, 1),
    ("DDP, static graph", "gpt2", "eager", 2, 1),
    ("DDP, bucket views", "llama", "eager", 2, 1),
    ("DDP, unused", "llama", "eager", 2, 1),
    ("DDP, made again", "llama", "eager", 2, 1),
    ("DDP, within", "llama", "eager", 2, 1),
    ("DDP, checkpointing", "llama", "eager", 2, 1),
    ("DDP", "llama", "eager", 2, 2),
    ("FSDP2", "gpt2", "aot_eager", 2, 1),
    ("FSDP2", "llama", "eager", 3, 1),  # 32 rows are not whole groups of M rows for 3 ranks
    ("FSDP2, whole", "llama", "eager", 2, 1),
    ("FSDP2, linears", "gpt2", "eager", 2, 1),
    ("FSDP2, no reshard", "gpt2", "eager", 2, 2),
    ("FSDP2, masks whole", "gpt2", "eager", 2, 1),
    ("FSDP2, offload", "gpt2", "eager", 2, 1),
    ("HSDP", "llama", "eager", 4, 1),
]


@pytest.mark.parametrize(("way", "name", "backend", "world", "micro_batches"), CASES)
def test_equal_to_one_process(ranks, way, name, backend, world, micro_batches):
    want = reference(world * micro_batches, name)
    for got in ranks.run(world, train, way, name, backend, micro_batches):
        assert_same(got, want)
