"""The ways to train a compiled model on several ranks."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import slope_fx
from parallel import alone, compiled, together


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


def fsdp_bf16(model):
    """Products in bf16, and the sums of gradients in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fsdp_blocks(model, mp_policy=policy)


class Rounded(torch.nn.Module):
    """Calls a model with its parameters rounded to bf16, as FSDP2 with a policy of bf16 does."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        rounded = {
            name: p.to(torch.bfloat16)
            for name, p in self.inner.named_parameters()
            if p.is_floating_point()
        }
        return functional_call(self.inner, rounded, kwargs=inputs)


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


def llama_plan():
    rows = ("self_attn.o_proj", "mlp.down_proj")
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
               "mlp.up_proj")  # fmt: skip
    return {n: ColwiseParallel() for n in columns} | {n: RowwiseParallel() for n in rows}


def tensor_parallel(model, mesh=None):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for block in blocks_of(model):
        parallelize_module(block, mesh, llama_plan())
    return model


def two_dimensions(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return fsdp_blocks(tensor_parallel(model, mesh["tp"]), mesh["dp"])


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
    "FSDP2, bf16": fsdp_bf16,
    "TP": tensor_parallel,
    "FSDP2 x TP": two_dimensions,
    "HSDP": lambda m: fsdp_blocks(m, init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))),
}


def shares(way, world):
    """How many parts of the batch the ranks have, and which is this rank's."""
    if way == "TP":
        return 1, 0
    rank = dist.get_rank() if dist.is_initialized() else 0
    return (world // 2, rank // 2) if way == "FSDP2 x TP" else (world, rank)


def train(way, name, backend, micro_batches=1):
    """Train on this rank in one of the ways."""
    _, share = shares(way, dist.get_world_size())
    model = compiled(name, backend, skip_first="TP" not in way)
    return together(model, WAYS[way], micro_batches=micro_batches, share=share)


_alone = {}


def reference(way, name, world, micro_batches):
    """The same training in one process."""
    batches = shares(way, world)[0] * micro_batches
    key = batches, name, "TP" not in way, "bf16" in way
    if key not in _alone:
        wrap = {"wrap": Rounded} if key[3] else {}
        backend = "eager" if key[3] else "aot_eager"
        model = compiled(name, backend, skip_first=key[2])
        _alone[key] = alone(batches, model, **wrap)
    return _alone[key]
