"""Rotary frequencies and other buffers that no checkpoint has, of models that were emptied."""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from transformers import AutoModelForCausalLM

import models
import slope_fx
from slope_fx.checkpoints import TrainingState, load_dense
from slope_fx.errors import ArgumentWarning

HOW = {"adapter_rank": 4, "backend": None}


def emptied(make):
    """A compiled model that was made on the meta device. What it holds is surely wrong."""
    with torch.device("meta"):
        model = make()
    slope_fx.compile(model, **HOW)
    return spoiled(model)


def spoiled(model):
    model.to_empty(device="cpu")
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    for tensor in (*model.parameters(), *model.buffers()):
        # to_empty has made the masks zero, which says that they have no content.
        if tensor.dtype != torch.uint8:
            tensor.data.fill_(7)
    return model


def from_dense(folder, make):
    make().save_pretrained(folder)
    want = slope_fx.compile(type(make()).from_pretrained(folder), **HOW)
    got = emptied(make)
    load_dense(folder, got)
    return got, want


def from_sparse(folder, make):
    want = slope_fx.compile(make(), **HOW)
    slope_fx.save_pretrained(want, folder)
    got = emptied(make)
    slope_fx.load_pretrained(folder, got)
    return got, want


def from_sparse_on_meta(folder, make):
    want = slope_fx.compile(make(), **HOW)
    slope_fx.save_pretrained(want, folder)
    with torch.device("meta"):
        got = slope_fx.compile(make(), **HOW)
    slope_fx.load_pretrained(folder, got)
    return got, want


def from_sparse_made_without_data(folder, make):
    want = slope_fx.compile(make(), **HOW)
    slope_fx.save_pretrained(want, folder)
    got = spoiled(slope_fx.load_pretrained(folder, device="meta", backend=None))
    slope_fx.load_pretrained(folder, got)
    return got, want


def from_dcp(folder, make):
    want = slope_fx.compile(make(), **HOW)
    dcp.save({"training": TrainingState(want)}, checkpoint_id=folder, no_dist=True)
    got = emptied(make)
    dcp.load({"training": TrainingState(got)}, checkpoint_id=folder, no_dist=True)
    return got, want


ROADS = [from_dense, from_sparse, from_sparse_on_meta, from_sparse_made_without_data, from_dcp]


@pytest.mark.parametrize(
    "make",
    [models.llama, pytest.param(models.gpt2, marks=pytest.mark.full), models.bert],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
def test_made_again_by_loading(tmp_path, road, make):
    """Right numbers, and no word of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArgumentWarning)
        got, want = road(tmp_path / "c", make)
    ids = models.batch()
    for name, buffer in want.named_buffers():
        assert torch.equal(got.get_buffer(name), buffer), name
    with torch.no_grad():
        torch.testing.assert_close(
            got.eval()(input_ids=ids).logits, want.eval()(input_ids=ids).logits, rtol=0, atol=0
        )


class Scaled(nn.Module):
    """A model with a buffer that its constructor computes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
        self.register_buffer("scale", torch.arange(32.0), persistent=False)

    def forward(self, x):
        return self.body(x) * self.scale


def test_what_nobody_can_make_is_named(tmp_path):
    """And what the caller has made again before loading stays."""
    want = slope_fx.compile(Scaled(), **HOW)
    path = slope_fx.save_pretrained(want, tmp_path / "c")
    got = emptied(Scaled)
    got.scale.copy_(want.scale)
    with pytest.warns(ArgumentWarning, match=r"^scale: no checkpoint stores them, to_empty"):
        slope_fx.load_pretrained(path, got)
    x = torch.randn(4, 32)
    assert torch.equal(got(x), want(x))
    with warnings.catch_warnings():  # not emptied
        warnings.simplefilter("error", ArgumentWarning)
        slope_fx.load_pretrained(path, got)
    assert torch.equal(got.scale, want.scale)


def test_buffers_of_a_model_with_content_stay(tmp_path):
    """Such as frequencies that the caller has scaled."""
    models.llama().save_pretrained(tmp_path)
    model = slope_fx.compile(AutoModelForCausalLM.from_pretrained(tmp_path), **HOW)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    before = model.model.rotary_emb.inv_freq.clone()
    load_dense(tmp_path, model)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
