"""A dense model and an adapter of PEFT become the sparse model that they were exported from."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import slope_fx
from models import batch, gpt2, llama
from slope_fx.checkpoints.pair import MASKS
from slope_fx.convert import convert
from slope_fx.errors import ArgumentWarning, CheckpointError


def trained(make, dtype=torch.float32, **more) -> nn.Module:
    """A compiled model with adapters at work, values of zero, and masks of its own."""
    torch.manual_seed(0)
    config = {"*.0.*": "1:4", "*": "2:4"}
    model = slope_fx.compile(
        make().to(dtype).eval(), config, adapter_rank=4, mask="random", backend=None
    )
    slope_fx.Schedule(model, 10, 0.0)
    with torch.no_grad():
        for weight in slope_fx.sparse_weights(model).values():
            weight.lora_B.normal_(0, 0.1)
            weight.scale = 0.7
            weight.values[::3] = 0  # which the dense model does not tell from what is pruned
    return model


def same(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batch()).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_there_and_back_bit_for_bit(make, dtype, tmp_path):
    model = trained(make, dtype)
    slope_fx.save_pretrained(model, tmp_path / "sparse")
    convert(tmp_path / "sparse", tmp_path / "adapter", "peft")
    convert(tmp_path / "adapter", tmp_path / "again", "sparse")
    again = slope_fx.load_pretrained(tmp_path / "again", backend=None)
    same(again, model)
    assert torch.equal(logits_of(again), logits_of(model))
    records = [slope_fx.record.record_of(m) for m in (again, model)]
    assert records[0].plans == records[1].plans
    assert records[0].config == records[1].config
    pairs = zip(*(slope_fx.sparse_weights(m).values() for m in (again, model)), strict=True)
    assert all((a.scale, a.adapter_active) == (b.scale, True) for a, b in pairs)


def test_by_hand(tmp_path):
    model = trained(llama)
    slope_fx.densify(model, "drop").save_pretrained(tmp_path / "dense")
    slope_fx.export_peft(model, tmp_path / "adapter", base_model=str(tmp_path / "dense"))
    convert(tmp_path / "adapter", tmp_path / "again", "sparse")
    same(slope_fx.load_pretrained(tmp_path / "again", backend=None), model)
    with pytest.raises(CheckpointError, match="slope-fx convert"):
        slope_fx.load_pretrained(tmp_path / "adapter")
    with pytest.warns(ArgumentWarning, match="sparsity has no effect"):
        convert(tmp_path / "adapter", tmp_path / "more", "sparse", sparsity="1:4")


def test_of_a_frozen_model(tmp_path):
    model = trained(llama)
    want = logits_of(model)
    slope_fx.save_pretrained(slope_fx.freeze(model), tmp_path / "frozen")
    convert(tmp_path / "frozen", tmp_path / "adapter", "peft")
    convert(tmp_path / "adapter", tmp_path / "again", "sparse")
    again = slope_fx.load_pretrained(tmp_path / "again", backend=None)
    torch.testing.assert_close(logits_of(again), want, rtol=1e-5, atol=1e-6)
    slope_fx.Schedule(again, 10, 0.0)  # it can train
    same(slope_fx.freeze(again), model)


def _edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _dense_again(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(1)


def _narrow(tensors):
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:2].clone()


DAMAGE = {
    "the dense model trained": ("adapter-base/model.safetensors", _dense_again, "not zero"),
    "another rank": ("adapter/adapter_model.safetensors", _narrow, "rank 4"),
    "no adapter": ("adapter/adapter_model.safetensors", dict.clear, "rank 4"),
    "other masks": (f"adapter/{MASKS}", lambda t: next(iter(t.values())).fill_(3), "SHA-256"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_not_the_pair(what, tmp_path):
    slope_fx.save_pretrained(trained(llama), tmp_path / "sparse")
    convert(tmp_path / "sparse", tmp_path / "adapter", "peft")
    file, change, words = DAMAGE[what]
    _edit(tmp_path / file, change)
    with pytest.raises(CheckpointError, match=words):
        convert(tmp_path / "adapter", tmp_path / "again", "sparse")
    assert not (tmp_path / "again").exists()
