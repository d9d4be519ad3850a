"""Models that are compiled on the meta device, sharded, and initialised by their own code."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import slope_fx
from models import TRANSFORMERS, batch, loss_of
from slope_fx.errors import StateError
from slope_fx.sparse.mask import Mask


def dense(kind, seed=3):
    """A dense model that is made on the meta device and initialised after ``manual_seed``."""
    with torch.device("meta"):
        model = TRANSFORMERS[kind]()
    return initialise(model, seed)


def initialise(model, seed=3):
    model.to_empty(device="cpu")
    model.tie_weights()  # to_empty makes tied parameters separate ones
    torch.manual_seed(seed)
    model.init_weights()
    return model


def on_meta(kind, **options):
    with torch.device("meta"):
        model = TRANSFORMERS[kind]()
    return slope_fx.compile(model, backend="aot_eager", adapter_rank=4, **options)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state(model):
    return {name: whole(tensor).numpy().copy() for name, tensor in model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


@pytest.mark.parametrize("mask", ["magnitude", "random"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_one_process(kind, mask):
    expected = slope_fx.compile(dense(kind), mask=mask, adapter_rank=4, backend="aot_eager")
    model = initialise(on_meta(kind, mask=mask))
    assert_equal(state(model), state(expected))
    weights = slope_fx.sparse_weights(model).values()
    assert all(isinstance(weight.forward_bits, Mask) for weight in weights)
    ids = batch()
    loss_of(model, ids).backward()
    loss_of(expected, ids).backward()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


class Mixed(nn.Module):
    """Layers that are initialised in several steps, in parts, and as a stack of transposed ones."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(16, 32), nn.Linear(32, 8)
        self.truncated, self.halves = nn.Linear(32, 64), nn.Linear(64, 32)
        self.orthogonal, self.copied = nn.Linear(32, 32), nn.Linear(32, 32)
        self.experts = nn.Parameter(torch.empty(2, 32, 64))

    def forward(self, x):
        h = self.halves(F.relu(self.truncated(self.first(x))))
        h = self.copied(F.relu(self.orthogonal(h)))
        h = torch.bmm(h.expand(2, *h.shape), self.experts).sum(0)
        return self.head(F.relu(h[:, :32]))

    @torch.no_grad()
    def init(self):
        for layer in (m for m in self.children() if isinstance(m, nn.Linear)):
            nn.init.zeros_(layer.bias)
            nn.init.normal_(layer.weight)
        nn.init.trunc_normal_(self.truncated.weight, mean=0.5, std=0.3)
        nn.init.xavier_uniform_(self.halves.weight[:16])
        self.halves.weight[16:].uniform_(-2, 1)
        nn.init.orthogonal_(self.orthogonal.weight, gain=3.0)
        self.copied.weight.copy_(torch.randn(32, 32).exp())
        self.experts.normal_().mul_(0.5)


def test_kinds_of_initialisation():
    """Repeated, in several steps, in parts, by copy_ and of transposed stacks."""
    expected = Mixed()
    torch.manual_seed(3)
    expected.init()
    x = torch.randn(4, 16)
    slope_fx.compile(expected, backend=None, example_inputs=x)
    with torch.device("meta"):
        model = Mixed()
    slope_fx.compile(model, backend=None, example_inputs=x)
    assert len(slope_fx.sparse_weights(model)) == len(slope_fx.sparse_weights(expected)) == 5
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init()
    assert_equal(state(model), state(expected))
    assert torch.equal(model(x), expected(x))


@torch.no_grad()
def plainly(model, seed=3):
    """Draw the weights of the linears in blocks, and nothing else."""
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            nn.init.trunc_normal_(module.weight, std=0.1)
    for name, parameter in model.named_parameters():
        if "layers" not in name or "norm" in name:
            parameter.fill_(0.5)


def shard(model):
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def train(model, steps=6):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = slope_fx.Schedule(model, steps, 0.5, backward_mask_interval=2)
    losses = []
    for step in range(steps):
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def sharded_first(mask, diverging):
    model = shard(on_meta("llama", mask=mask, skip_first=False))
    with pytest.raises(StateError, match=r"layers.0.self_attn.q_proj: .* is on the meta device"):
        slope_fx.Schedule(model, 3)
    model.to_empty(device="cpu")
    with pytest.raises(StateError, match=r"layers.0.self_attn.q_proj: .* is not initialized"):
        slope_fx.Schedule(model, 3)
    plainly(model, 3 + diverging * dist.get_rank())
    for module in model.modules():
        if "Rotary" in type(module).__name__:
            model._init_weights(module)
    return state(model), train(model)


@pytest.mark.parametrize(("mask", "world", "diverging"), [("magnitude", 2, 1), ("random", 2, 0)])
def test_sharded_then_initialised(ranks, mask, world, diverging):
    """Each rank has its rows of rank 0's matrices, also if their random states differ."""
    expected = dense("llama")
    plainly(expected)
    slope_fx.compile(expected, mask=mask, adapter_rank=4, backend="aot_eager", skip_first=False)
    before, losses = state(expected), train(expected)
    for found, theirs in ranks.run(world, sharded_first, mask, diverging):
        assert_equal(found, before)
        assert theirs == pytest.approx(losses, abs=2e-5)
