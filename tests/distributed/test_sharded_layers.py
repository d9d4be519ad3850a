"""Sparse layers that are split over ranks: what can be read, written, saved and refused."""

import copy
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import models
import slope_fx
from slope_fx.errors import StateError, UnsupportedError
from slope_fx.sparse.shards import whole
from slope_fx.sparse.weight import SparseWeight

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def two_linears(up=64, down=64, pattern="2:4"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, up), nn.GELU(), nn.Linear(up, down))
    return slope_fx.compile(
        model, pattern, adapter_rank=4, skip_first=False, skip_head=False, example_inputs=X,
        backend="aot_eager",
    )  # fmt: skip


def split(model, mesh, dp=None):
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return model if dp is None else fully_shard(model, mesh=dp)


def pairs(model, other):
    return zip(
        slope_fx.sparse_weights(model).values(), slope_fx.sparse_weights(other).values(),
        strict=True,
    )  # fmt: skip


def read_and_write(with_fsdp, path):
    if with_fsdp:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = two_linears()
        parts = split(copy.deepcopy(model), mesh["tp"], mesh["dp"])
    else:
        model = two_linears()
        parts = split(copy.deepcopy(model), init_device_mesh("cpu", (2,)))
    for mine, other in pairs(parts, model):
        for method in (
            SparseWeight.to_dense,
            SparseWeight.forward_mask,
            SparseWeight.backward_mask,
        ):
            assert torch.equal(method(mine), method(other)), method
        assert not mine.masks_problem()
        mine.write_(2 * mine.to_dense())  # from the shards
        other.write_(2 * other.to_dense())
        assert torch.equal(whole(mine.values), other.values)
        dense = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
        mine.write_(dense)  # from the same tensor on all ranks
        other.write_(dense)
        assert torch.equal(whole(mine.values), other.values)
        assert torch.equal(whole(mine.backward_bits), other.backward_bits)
    slope_fx.save_pretrained(parts, path)
    dist.barrier()
    dense = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    stored = slope_fx.load_pretrained(path, dense).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor), name


@pytest.mark.parametrize("with_fsdp", [False, True])
def test_read_and_write(ranks, tmp_path, with_fsdp):
    ranks.run(4 if with_fsdp else 2, read_and_write, with_fsdp, tmp_path / "model")


def gathered_by_a_forward(no_reshard):
    """Writes to a weight that FSDP2 has gathered for a forward, and left so."""
    model = two_linears()
    if no_reshard:
        fully_shard(model[2], reshard_after_forward=False)
    fully_shard(model)  # a root stays gathered after a forward
    weight = slope_fx.sparse_weights(model)["2"]
    for write in (
        lambda: weight.write_(torch.ones(weight.shape)),
        lambda: nn.init.constant_(model[2].weight, 2.0),
    ):
        with torch.no_grad():
            model(torch.randn(3, 64))
        assert not isinstance(weight.values, DTensor)
        write()
        written = weight.to_dense().sum()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        assert weight.to_dense().sum() == written
        assert whole(weight.values).unique().numel() == 1
        assert not weight.masks_problem()
    with pytest.raises(UnsupportedError, match=r"is sharded\. Save the model"):
        slope_fx.densify(model, inplace=True)
    assert slope_fx.sparse_weights(model)


@pytest.mark.parametrize("no_reshard", [False, True])
def test_a_write_after_a_forward_is_kept(ranks, no_reshard):
    ranks.run(2, gathered_by_a_forward, no_reshard)


def weight_in_eager_code():
    model = two_linears()
    parts = split(copy.deepcopy(model), init_device_mesh("cpu", (2,)))
    for layer, other in ((parts[0], model[0]), (parts[2], model[2])):
        assert torch.equal(layer.weight.full_tensor(), other.weight)
        (layer.weight * layer.weight).sum().backward()
        (other.weight * other.weight).sum().backward()
        assert torch.equal(layer.weight_values.grad.full_tensor(), other.weight_values.grad)
        # An initialization is kept, a write that the mask would drop is refused.
        nn.init.constant_(layer.weight, 3.0)
        assert bool((whole(layer.weight_values.detach()) == 3).all())
        with torch.no_grad():
            layer.weight.mul_(2.0)
        assert bool((whole(layer.weight_values.detach()) == 6).all())
        layer.weight.data = layer.weight.detach() / 2
        assert bool((whole(layer.weight_values.detach()) == 3).all())
        layer.weight.data.mul_(2)
        with pytest.raises(UnsupportedError, match="elements that are pruned"), torch.no_grad():
            layer.weight.add_(1.0)
        assert bool((whole(layer.weight_values.detach()) == 6).all())


def test_weight_in_eager_code(ranks):
    ranks.run(2, weight_in_eager_code)


def refused():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = two_linears(up=24)
    with pytest.raises(UnsupportedError) as error:
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
    column = str(error.value)
    with pytest.raises(UnsupportedError) as error:
        parallelize_module(model, mesh, {"2": RowwiseParallel()})
    row = str(error.value)
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    good = split(two_linears(), mesh)
    with pytest.raises(StateError, match="0 is sharded already"):
        ColwiseParallel()._partition_linear_fn("0", good[0], mesh)
    return column, row


def test_widths_that_cannot_be_split_are_refused(ranks):
    column, row = ranks.run(4, refused)[0]
    assert "0 (d_out, d_in) = (24, 64), 2:4: ColwiseParallel splits its output width 24" in column
    assert "Allowed for it are meshes of 1 or 2 or 3 or 6 ranks" in column
    assert "2 (d_out, d_in) = (64, 24), 2:4: RowwiseParallel splits its input width 24" in row
    assert "No mesh fits it" in row


def engines_and_bytes():
    parts = split(two_linears(), init_device_mesh("cpu", (2,)))
    parts(X).sum().backward()
    return [
        (row.name, row.shape, row.reason, len(row.products))
        for row in slope_fx.explain(parts).sparse
    ]


def test_explain_names_the_engines_of_the_parts(ranks):
    assert ranks.run(2, engines_and_bytes) == 2 * [[("0", (64, 64), "", 2), ("2", (64, 64), "", 3)]]


def split_by_transformers(path):
    from transformers import AutoModelForCausalLM

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    with mock.patch.dict(os.environ, env):  # as under torchrun
        model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
    with pytest.raises(UnsupportedError, match="Load the model without tp_plan"):
        slope_fx.compile(model)


def test_a_model_that_transformers_has_split_is_refused(ranks, tmp_path):
    models.llama().save_pretrained(tmp_path)
    ranks.run(2, split_by_transformers, str(tmp_path))


def from_meta():
    """Made on the meta device, split, given storage, then initialised by its own code."""

    def made(device):
        with torch.device(device):
            model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        return slope_fx.compile(
            model, adapter_rank=4, skip_first=False, skip_head=False, backend="aot_eager",
            example_inputs=X.to(device),
        )  # fmt: skip

    def initialise(model):
        model.to_empty(device="cpu")
        torch.manual_seed(3)
        # Random biases would not be those of one process: a rank draws those of its part alone.
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    model, parts = made("meta"), made("meta")
    parts = split(parts, init_device_mesh("cpu", (2,)))
    initialise(model)
    initialise(parts)
    for (name, tensor), part in zip(
        model.state_dict().items(), parts.state_dict().values(), strict=True
    ):
        assert isinstance(part, DTensor), name
        assert torch.equal(part.full_tensor(), tensor), name


def test_a_model_made_on_the_meta_device(ranks):
    ranks.run(2, from_meta)
