"""Models that are compiled on the meta device, sharded, and initialised by their own code."""

import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import slope_fx
from models import TRANSFORMERS, batch, loss_of
from slope_fx.checkpoints import load_dense
from slope_fx.errors import ArgumentError, CheckpointError, StateError
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


@pytest.mark.parametrize(
    ("kind", "mask"),
    [
        ("gpt2", "magnitude"),
        pytest.param("gpt2", "random", marks=pytest.mark.full),
        pytest.param("llama", "magnitude", marks=pytest.mark.full),
        ("llama", "random"),
    ],
)
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
        self.zeroed, self.halves = nn.Linear(32, 64), nn.Linear(64, 32)
        self.orthogonal, self.copied = nn.Linear(32, 32), nn.Linear(32, 32)
        self.experts = nn.Parameter(torch.empty(2, 32, 64))

    def forward(self, x):
        h = self.halves(F.relu(self.zeroed(self.first(x))))
        h = self.copied(F.relu(self.orthogonal(h)))
        h = torch.bmm(h.expand(2, *h.shape), self.experts).sum(0)
        return self.head(F.relu(h[:, :32]))

    @torch.no_grad()
    def init(self):
        for layer in (m for m in self.children() if isinstance(m, nn.Linear)):
            nn.init.zeros_(layer.bias)
            nn.init.normal_(layer.weight)
        nn.init.sparse_(self.zeroed.weight, sparsity=0.4, std=0.3)
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


def factors_of_s_ste():
    """The factors of a model that each rank draws with a seed of its own, and what they are of."""
    with torch.device("meta"):
        model = TRANSFORMERS["llama"]()
    slope_fx.compile(model, backend=None, method="s-ste", skip_first=False)
    shard(model).to_empty(device="cpu")
    plainly(model, 3 + dist.get_rank())
    found = {}
    for name, weight in slope_fx.sparse_weights(model).items():
        matrix, bits = whole(weight.values.detach()), whole(weight.forward_bits.detach())
        want = weight.method.factor(matrix, bits.as_subclass(torch.Tensor), weight.pattern)
        found[name] = float(weight.factor), float(want)
    return found


def test_the_factor_is_that_of_the_values(ranks):
    """S-STE reads the values times a factor: all ranks have that of rank 0's matrix."""
    first, second = ranks.run(2, factors_of_s_ste)
    assert first == second
    assert all(factor == pytest.approx(want, rel=1e-6) for factor, want in first.values())


class Narrow(nn.Module):
    """The second layer has fewer rows than three ranks need."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def forgotten():
    """What each rank says of a layer that was not initialised, also one without a row of it."""
    with torch.device("meta"):
        model = Narrow()
        x = torch.empty(2, 16)
    slope_fx.compile(model, "2:4", backend=None, example_inputs=x, skip_first=False)
    fully_shard(model).to_empty(device="cpu")
    model.first.reset_parameters()
    with pytest.raises(StateError) as error:
        slope_fx.Schedule(model, 3)
    return str(error.value), len(model.second.weight_values.to_local())


def test_a_rank_without_rows_raises_with_the_others(ranks):
    told = ranks.run(3, forgotten)
    assert {message for message, _ in told} == {told[0][0]}
    assert "second: its sparse weight is not initialized" in told[0][0]
    assert [rows for _, rows in told] == [2, 2, 0]


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


@pytest.mark.parametrize(
    ("mask", "world", "diverging"),
    [("magnitude", 2, 1), pytest.param("random", 2, 0, marks=pytest.mark.full)],
)
def test_sharded_then_initialised(ranks, mask, world, diverging):
    """Each rank has its rows of rank 0's matrices, also if their random states differ."""
    expected = dense("llama")
    plainly(expected)
    slope_fx.compile(expected, mask=mask, adapter_rank=4, backend="aot_eager", skip_first=False)
    before, losses = state(expected), train(expected)
    for found, theirs in ranks.run(world, sharded_first, mask, diverging):
        assert_equal(found, before)
        assert theirs == pytest.approx(losses, abs=2e-5)


def loaded(kind, folder):
    model = fully_shard(on_meta(kind))
    model.to_empty(device="cpu")
    model.tie_weights()
    load_dense(folder, model)
    return state(model)


@pytest.mark.parametrize("kind", [pytest.param("gpt2", marks=pytest.mark.full), "llama"])
def test_dense_checkpoint(ranks, tmp_path, kind):
    """As if it were loaded before compile: into a sharded model, and into one with other masks."""
    model = dense(kind, 11)
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model.base_model.save_pretrained(tmp_path / "base")  # its names lack a prefix
    head = kind == "gpt2"  # llama's base model has no head, and gpt2's is its embedding
    other = slope_fx.compile(dense(kind, 13), adapter_rank=4, backend="aot_eager")
    torch.manual_seed(0)
    slope_fx.compile(model, adapter_rank=4, backend="aot_eager")
    load_dense(tmp_path / ("base" if head else "shards"), other)
    assert_equal(state(other), state(model))
    for found in ranks.run(2, loaded, kind, tmp_path / "shards"):
        assert_equal(found, state(model))


def read_by_one(folder):
    model = initialise(shard(on_meta("llama")))
    before = state(model)
    with pytest.raises(CheckpointError) as error:
        load_dense(folder / ("there" if dist.get_rank() == 0 else "elsewhere"), model)
    assert_equal(state(model), before)
    return str(error.value)


def test_a_dense_checkpoint_that_one_rank_cannot_read(ranks, tmp_path):
    """No rank waits for it."""
    dense("llama").save_pretrained(tmp_path / "there")
    first, second = ranks.run(2, read_by_one, tmp_path)
    assert re.search(r"rank 1 failed.*elsewhere has no safetensors file", first)
    assert "elsewhere has no safetensors file" in second


def test_wrong_dense_checkpoint(tmp_path):
    model = dense("llama", 11)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slope_fx.compile(model, backend=None)
    before, name = state(model), "model.layers.0.mlp.up_proj.weight"
    for wrong, match in [
        ({n: t for n, t in tensors.items() if n != name}, f"has no tensor {name}"),
        (
            {**tensors, "other": tensors[name].clone()},
            "has other, for which the model has no place",
        ),
        (
            {**tensors, name: tensors[name].t().contiguous()},
            rf"{name} is \(32, 64\); .* \(64, 32\)",
        ),
    ]:
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(CheckpointError, match=match):
            load_dense(tmp_path / "wrong.safetensors", model)
    assert_equal(state(model), before)
    save_file(tensors, tmp_path / "good.safetensors")
    with pytest.raises(StateError, match=r"model\.layers\..* is on the meta device"):
        load_dense(tmp_path / "good.safetensors", on_meta("llama"))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_dense(tmp_path / "nothing", model)
    slope_fx.compile(rich := dense("llama"), backend=None, adapter_rank=4, adapter_init="svd")
    with pytest.raises(ArgumentError, match="adapter_init='svd'"):
        load_dense(tmp_path / "good.safetensors", rich)


def test_without_content():
    """What needs the weights says which layer has none, and what to do."""
    model, ids = on_meta("llama"), batch()
    layer, name = model.model.layers[1].mlp.up_proj, "model.layers.1.mlp.up_proj"
    weight = slope_fx.sparse_weights(model)[name]
    model.init_weights()  # has no effect on the meta device
    for device in ("meta", "cpu"):
        if device == "cpu":
            model.to_empty(device="cpu")
            assert not weight.forward_bits.any()
        uses = [
            weight.to_dense,
            weight.forward_mask,
            weight.refresh_backward_mask,
            lambda: F.linear(torch.ones(1, 32, device=device), layer.weight),  # noqa: B023
            lambda: slope_fx.Schedule(model, 3),
            lambda: slope_fx.save_pretrained(model, "unwritten"),
            lambda: slope_fx.densify(model),
            lambda: torch.optim.SGD(model.parameters()).step(),
        ]
        if device == "cpu":
            uses.append(lambda: loss_of(model, ids))
        for use in uses:
            with pytest.raises(StateError, match=r"model\.layers\..* (initialized|meta device)"):
                use()
    with torch.no_grad():
        layer.weight[:8].normal_()
    with pytest.raises(StateError, match="initialized in part"):
        weight.to_dense()


def test_content_from_elsewhere():
    """A state dict, a write into the tensors, and to_empty of a trained model."""
    model, source = initialise(on_meta("llama"), 4), initialise(on_meta("llama"))
    model.load_state_dict(source.state_dict())
    other = on_meta("llama").to_empty(device="cpu")
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), source.parameters(), strict=True):
            mine.copy_(theirs)
    for filled in (model, other):
        weight = slope_fx.sparse_weights(filled)["model.layers.1.mlp.up_proj"]
        layer, theirs = (m.model.layers[1].mlp.up_proj for m in (filled, source))
        assert torch.equal(layer.weight, theirs.weight)
        mask = weight.forward_mask()
        nn.init.normal_(layer.weight)  # keeps the mask
        assert torch.equal(weight.forward_mask(), mask)
    slope_fx.Schedule(filled, 3)
    filled.to_empty(device="cpu")
    with pytest.raises(StateError, match=r"not initialized\. Load a checkpoint"):
        weight.to_dense()
    with pytest.raises(StateError, match="masks were lost"):
        nn.init.normal_(filled.model.layers[1].mlp.up_proj.weight)
    filled.load_state_dict(source.state_dict())
    assert_equal(state(filled), state(source))


@pytest.mark.parametrize(
    "options",
    [
        {"mask": lambda name, weight: weight > 0},
        {"mask": "wanda", "calibration": [batch()]},
        {"adapter_init": "svd"},
        {"adapter_init": lambda *args: args},
        {"adapter_init": "eora", "calibration": [batch()]},
    ],
)
def test_refused(options):
    with pytest.raises(
        ArgumentError, match=r"needs the weights, and model.layers.0.* is on the meta"
    ):
        on_meta("llama", **options)
