"""Tensor and sequence parallelism: the losses, gradients and weights of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import models
import slope_fx
from slope_fx.sparse.shards import whole

STEPS, LR = 12, 3e-3


class Block(nn.Module):
    def __init__(self, width, bias=True):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Mlp(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 16)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mlp(backend="aot_eager", **more):
    """Compiled, with adapters that matter as soon as they are active."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 16)
    options = {"adapter_rank": 4, "backend": backend, "on_fallback": "error", **more}
    model = slope_fx.compile(Mlp(), "2:4", example_inputs=x, **options)
    return with_large_adapters(model)


def with_large_adapters(model):
    generator = torch.Generator().manual_seed(7)
    for weight in slope_fx.sparse_weights(model).values():
        if weight.lora_B is not None:
            weight.lora_B.data.normal_(generator=generator).mul_(0.1)
    return model


def inputs(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, 4, 16, generator=generator)


def mlp_loss(model, step):
    x = inputs(step)
    return (model(x) - x).square().mean()


def train(model, loss_of, steps=STEPS):
    """The losses, the gradients of the last step, and the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-4, foreach=False)
    schedule = slope_fx.Schedule(model, steps, adapter_start=0.5, backward_mask_interval=3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(whole(loss.detach()).item())
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, {n: whole(p.detach()) for n, p in model.state_dict().items()}


def assert_alike(got, want):
    """No bit of a mask differs, and the rest within rounding of each tensor's norm."""
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    for mine, other in zip(got[1:], want[1:], strict=True):
        assert mine.keys() == other.keys()
        for name, tensor in other.items():
            if tensor.dtype == torch.uint8:
                assert torch.equal(mine[name], tensor), name
        for name, tensor in other.items():
            if tensor.dtype != torch.uint8:
                error = (mine[name] - tensor).norm() / tensor.norm()
                assert error < 1e-4, f"{name}: {error}"


def split_mlp(model, mesh):
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def mlp_as_one(backend, rank=4):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = mlp(backend, adapter_rank=rank)
    want = train(copy.deepcopy(model), mlp_loss)
    got = train(split_mlp(model, mesh), mlp_loss)
    assert_alike(got, want)
    sparse = slope_fx.sparse_weights(model)
    assert {weight.values.placements for weight in sparse.values()} == {(Shard(0),), (Shard(1),)}
    assert all(weight.adapter_active == (rank is not None) for weight in sparse.values())
    assert not any(row.reason for row in slope_fx.explain(model).sparse)
    return want[0][0], want[0][-1]


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("world", "backend", "rank"),
    [
        pytest.param(2, "inductor", 4, marks=FULL),
        pytest.param(4, "aot_eager", 4, marks=FULL),
        pytest.param(2, "aot_eager", 4, marks=FULL),
        (2, "eager", 4),
        (2, "eager", None),
        pytest.param(2, "inductor", None, marks=FULL),
        pytest.param(4, "inductor", 4, marks=FULL),
    ],
)
def test_column_and_row_parallel(ranks, world, backend, rank):
    first, last = ranks.run(world, mlp_as_one, backend, rank)[0]
    assert last < 0.85 * first


def mlp_sequence_parallel():
    """Activations split by tokens outside of the products, gathered before the first of a block."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = mlp()
    want = train(copy.deepcopy(model), mlp_loss)
    for block in model.blocks:
        plan = {
            "": PrepareModuleInput(
                input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False
            ),
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        }
        parallelize_module(block, mesh, plan)
    parallelize_module(model.head, mesh, ColwiseParallel(output_layouts=Replicate()))
    parallelize_module(model.embed, mesh, ColwiseParallel(output_layouts=Replicate()))
    assert_alike(train(model, mlp_loss), want)


def test_sequence_parallel(ranks):
    ranks.run(2, mlp_sequence_parallel)


def llama_plan():
    return {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }


def llama_loss(model, step):
    return models.loss_of(model, models.batch(step))


def llama_as_one(backend):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = slope_fx.compile(
        models.llama(), adapter_rank=4, backend=backend, on_fallback="error", skip_first=False
    )
    want = train(copy.deepcopy(with_large_adapters(model)), llama_loss)
    for layer in model.model.layers:
        parallelize_module(layer, mesh, llama_plan())
    assert_alike(train(model, llama_loss), want)


@FULL
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_llama(ranks, backend):
    ranks.run(2, llama_as_one, backend)


def llama_loss_parallel():
    """The dense head gives logits split by vocabulary, and the loss is computed from the parts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = slope_fx.compile(
        models.llama(), adapter_rank=4, backend="aot_eager", on_fallback="error", skip_first=False
    )
    whole_model = copy.deepcopy(with_large_adapters(model))

    def loss_of(model, step):
        ids = models.batch(step)
        logits = model(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    want = train(whole_model, loss_of)
    for layer in model.model.layers:
        parallelize_module(layer, mesh, llama_plan())
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, {"lm_head": head})
    with loss_parallel():
        got = train(model, loss_of)
    assert_alike(got, want)


@pytest.mark.full
def test_loss_parallel(ranks):
    ranks.run(2, llama_loss_parallel)


def with_fsdp():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = mlp()

    def local_loss(model, step):
        half = inputs(step)[dist.get_rank() // 2 :][:1]
        return (model(half) - half).square().mean()

    want = train(copy.deepcopy(model), mlp_loss)
    split_mlp(model, mesh["tp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    losses, gradients, weights = train(model, local_loss)
    total = torch.tensor(losses)
    dist.all_reduce(total)
    assert_alike(((total / 4).tolist(), gradients, weights), want)


@pytest.mark.full  # ranks_matrix.py has it too
def test_two_dimensions_with_fsdp(ranks):
    ranks.run(4, with_fsdp)
