"""``fully_shard`` before ``compile`` gives the masks, losses and weights of the other order."""

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import models
import slope_fx
from parallel import assert_same, together, whole_state
from peak import Peak
from slope_fx.errors import ArgumentError, SlopeError, UnsupportedError
from ways import fsdp_blocks, fsdp_whole

STEPS = 8


def linears(model):
    """Each linear by itself, and the rest in one group."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, module in list(model.named_modules()):
        if "layers" in name and isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def together_in_groups(model):
    """Two blocks in one group."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(list(model.model.layers), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hsdp(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
    return fsdp_blocks(model, mesh)


WAYS = {
    "blocks": fsdp_blocks,
    "whole": fsdp_whole,
    "linears": linears,
    "group": together_in_groups,
    "no reshard": partial(fsdp_blocks, reshard_after_forward=False),
    "offload": partial(fsdp_blocks, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "bf16": partial(fsdp_blocks, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    "hsdp": hsdp,
}


def pruned(model, backend="aot_eager", on_fallback="error"):
    torch.manual_seed(0)
    model = slope_fx.compile(model, adapter_rank=2, backend=backend, on_fallback=on_fallback)
    generator = torch.Generator().manual_seed(5)
    for weight in slope_fx.sparse_weights(model).values():
        big = torch.randn(weight.lora_B.shape, generator=generator) * 0.1
        if isinstance(weight.lora_B, DTensor):
            big = torch.distributed.tensor.distribute_tensor(
                big, weight.lora_B.device_mesh, weight.lora_B.placements
            )
        weight.lora_B.data.copy_(big)
    return model


def both_orders(way, name, backend, ran):
    torch.manual_seed(0)
    shard, on_fallback = WAYS[way], "error"
    if way == "linears":  # their hooks break each graph in both orders
        on_fallback = "ignore"
    later = pruned(getattr(models, name)(), backend, on_fallback)
    want = together(later, shard, steps=STEPS)
    torch._dynamo.reset()
    torch.manual_seed(0)
    first = shard(getattr(models, name)())
    optimizer = torch.optim.SGD(first.parameters())
    if ran:  # FSDP2 has set itself up, and the root has whole parameters
        with torch.no_grad():
            first(input_ids=models.batch())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pruned(first, backend, on_fallback)
        optimizer.step()
    assert any("made before slope_fx.compile" in str(w.message) for w in told)
    del optimizer
    assert {n: (p.placements, p.shape) for n, p in first.named_parameters()} == {
        n: (p.placements, p.shape) for n, p in later.named_parameters()
    }
    got = together(first, lambda model: model, steps=STEPS)
    assert_same(got, want)
    first.load_state_dict(first.state_dict())  # the hooks of the dense parameters are gone
    assert all(w.adapter_active for w in slope_fx.sparse_weights(first).values())
    return got["losses"]


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("way", "name", "world", "backend", "ran"),
    [
        pytest.param("blocks", "llama", 2, "inductor", False, marks=FULL),
        pytest.param("blocks", "gpt2", 2, "aot_eager", True, marks=FULL),
        pytest.param("whole", "llama", 2, "aot_eager", False, marks=FULL),
        pytest.param("linears", "llama", 2, "aot_eager", True, marks=FULL),
        pytest.param("group", "llama", 2, "aot_eager", False, marks=FULL),
        ("no reshard", "gpt2", 2, "aot_eager", True),
        pytest.param("offload", "llama", 2, "aot_eager", False, marks=FULL),
        pytest.param("bf16", "llama", 2, "aot_eager", False, marks=FULL),
        pytest.param("hsdp", "llama", 4, "aot_eager", False, marks=FULL),
        pytest.param("blocks", "llama", 4, "aot_eager", True, marks=FULL),
    ],
)
def test_same_as_compile_first(ranks, way, name, world, backend, ran):
    ranks.run(world, both_orders, way, name, backend, ran)


def meta_in_both_orders():
    runs = []
    for order in ((pruned_on_meta, fsdp_blocks), (fsdp_blocks, pruned_on_meta)):
        with torch.device("meta"):
            model = models.llama()
        for step in order:
            model = step(model)
        model.to_empty(device="cpu")
        torch.manual_seed(3)
        model.init_weights()
        runs.append(together(model, lambda model: model, steps=4))
    assert_same(*runs)


def pruned_on_meta(model):
    slope_fx.compile(model, adapter_rank=2, backend="aot_eager", on_fallback="error")
    assert all(w.values.is_meta for w in slope_fx.sparse_weights(model).values())
    return model


def test_on_meta(ranks):
    ranks.run(2, meta_in_both_orders)


def undone():
    """A mask function that fails at the last layer leaves a sharded model that trains as before."""
    torch.manual_seed(0)
    model, other = (fsdp_blocks(models.llama()) for _ in range(2))
    other.load_state_dict(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    groups = [g for m in model.modules() if isinstance(m, FSDPModule)
              for g in m._get_fsdp_state()._fsdp_param_groups]  # fmt: skip
    params, names = [list(g.fsdp_params) for g in groups], list(model.state_dict())
    seen = []

    def mask(name, weight):
        seen.append(name)
        if len(seen) == 5:
            raise RuntimeError("no mask")
        return torch.tensor([True, True, False, False]).repeat(weight.numel() // 4).view_as(weight)

    with pytest.raises(RuntimeError, match="no mask"):
        slope_fx.compile(model, mask=mask, adapter_rank=2)
    assert [type(m) for m in model.modules()] == kinds
    assert [g.fsdp_params for g in groups] == params
    assert list(model.state_dict()) == names
    model.load_state_dict(model.state_dict())
    for one in (model, other):
        models.loss_of(one, models.batch()).backward()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
    mine, theirs = whole_state(model), whole_state(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    slope_fx.compile(model)  # and compiles


def test_failure_restores(ranks):
    ranks.run(2, undone)


def memory():
    torch.manual_seed(0)
    model = fsdp_blocks(models.llama())
    largest = max(p.numel() * 4 for p in model.model.layers.parameters())
    with Peak() as counted:
        slope_fx.compile(model, adapter_rank=2, backend=None)
    sparse = slope_fx.sparse_weights(model).values()
    made = sum(p.to_local().nbytes for w in sparse for p in (w.values, *w.parameters()))
    return counted.peak, made, largest


def test_memory(ranks):
    """A rank holds its shards and some copies of one of the 14 layers."""
    for peak, made, largest in ranks.run(2, memory):
        assert made <= peak < made + 8 * largest


def refused():
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = models.llama()
    for block in model.model.layers:
        parallelize_module(block, mesh["tp"], {"mlp.up_proj": ColwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.up_proj\.weight is a DTensor"):
        slope_fx.compile(model)
    model = fsdp_blocks(models.llama())
    with pytest.raises(UnsupportedError, match="is a DTensor"):  # the root has the embedding
        slope_fx.compile(torch.nn.ModuleDict({"a": model.model.layers[0], "b": model.lm_head}))
    with pytest.raises(ArgumentError, match=r"wanda.* needs a model that is not sharded"):
        slope_fx.compile(model, mask="wanda", calibration=[models.batch()])
    with pytest.raises(SlopeError, match="nothing-here"):
        slope_fx.load_pretrained("nothing-here", model)


def test_refused(ranks):
    ranks.run(2, refused)
