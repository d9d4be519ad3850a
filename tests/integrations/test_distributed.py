"""DDP and FSDP2 around a compiled model, in one process: the plumbing, not the scaling."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import models
import slope_fx
from models import batch, loss_of
from slope_fx.sparse.shards import whole


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model):
    mesh = init_device_mesh("cpu", (1,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("wrap", [ddp, pytest.param(fsdp, marks=pytest.mark.full)])
def test_wrapped_trains_as_bare(wrap, one_process):
    """Both phases, a refresh of the masks at each step, the same losses."""
    start = slope_fx.compile(models.gpt2(), adapter_rank=2, backend="aot_eager")

    def train(model, compiled):
        optimizer = torch.optim.AdamW(compiled.parameters(), lr=3e-3)
        schedule = slope_fx.Schedule(compiled, 6, adapter_start=0.5, backward_mask_interval=1)
        losses = []
        for step in range(6):
            loss = loss_of(model, batch(seed=step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        return losses

    bare, compiled = copy.deepcopy(start), copy.deepcopy(start)
    want = train(bare, bare)
    assert train(wrap(compiled), compiled) == pytest.approx(want, rel=1e-5)
    assert all(w.adapter_active for w in slope_fx.sparse_weights(compiled).values())
    assert all(row.reason == "" for row in slope_fx.explain(compiled).sparse)


def test_a_sharded_model_is_saved_whole(one_process, tmp_path):
    """Weights and the optimizer's state; what comes back is not sharded."""
    model = slope_fx.compile(models.gpt2(), adapter_rank=2, backend="eager")
    fsdp(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss_of(model, batch()).backward()
    optimizer.step()
    path = slope_fx.save_pretrained(model, tmp_path / "c", training={"optimizer": optimizer})
    loaded = slope_fx.load_pretrained(path, backend="eager")
    assert type(loaded).__name__ == "GPT2LMHeadModel"
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], whole(value)), name
    again = torch.optim.AdamW(loaded.parameters(), lr=3e-3)
    slope_fx.load_training(path, {"optimizer": again})
    for old, new in zip(model.parameters(), loaded.parameters(), strict=True):
        for key, value in optimizer.state.get(old, {}).items():
            assert torch.equal(again.state[new][key], whole(value)), key


def test_ddp_made_first_is_refused(one_process):
    """The wrapper itself at once; the model in it when the wrapper first runs."""
    model = models.gpt2()
    wrapped = ddp(model)
    with pytest.raises(slope_fx.errors.ArgumentError, match="wrapped in DistributedDataParallel"):
        slope_fx.compile(wrapped, backend="aot_eager")
    slope_fx.compile(model, backend="aot_eager")
    with pytest.raises(slope_fx.errors.StateError, match=r"Call slope_fx.compile first, then wrap"):
        wrapped(batch())


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("first", ["a model alike", "the model itself"])
def test_ddp_made_first_is_found_whatever_was_compiled_before(one_process, first, unused):
    """Dynamo reuses a graph: nothing is compiled when the wrong wrapper runs."""
    x, how = torch.randn(8, 16), {"backend": "eager", "region": "model"}
    model = Plain()
    wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
    slope_fx.compile(model, example_inputs=x, **how)
    if first == "a model alike":
        other = slope_fx.compile(Plain(), example_inputs=x, **how)
        right = DistributedDataParallel(other, find_unused_parameters=unused)
        right(x).sum().backward()
    else:
        model(x).sum().backward()
    for _ in range(2):
        with pytest.raises(slope_fx.errors.StateError, match=r"Call slope_fx\.compile first"):
            wrapped(x)
    with wrapped.no_sync(), pytest.raises(slope_fx.errors.StateError):
        wrapped(x)


def test_ddp_made_first_is_found_in_eager_code(one_process):
    model = models.gpt2()
    wrapped = ddp(model)
    slope_fx.compile(model, backend=None, on_fallback="ignore")
    with pytest.raises(slope_fx.errors.StateError, match=r"Call slope_fx\.compile first"):
        wrapped(batch())
