"""Loading a model never takes the memory of the dense model."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import slope_fx
from models import batch
from peak import Peak


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=6, hidden_size=64, intermediate_size=256, num_attention_heads=4,
            vocab_size=64, max_position_embeddings=32, tie_word_embeddings=True,
        )
    )  # fmt: skip


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(n_layer=6, n_head=2, n_embd=64, vocab_size=64, n_positions=32)
    )


def nbytes(model):
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("build", [llama, gpt2])
def test_peak(build, tmp_path):
    model = build()
    dense, one = nbytes(model), max(p.nbytes for p in model.parameters())
    slope_fx.compile(model, backend=None)
    sparse = nbytes(model)
    slope_fx.save_pretrained(model, tmp_path)
    with Peak() as counted:
        loaded = slope_fx.load_pretrained(tmp_path, backend=None)
    assert sparse <= counted.peak < sparse + 2 * one < dense
    want = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    got = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    ids = batch()
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
    with Peak() as counted:
        blank = slope_fx.load_pretrained(tmp_path, device="meta", backend=None)
    assert counted.peak < one / 2
    assert all(p.is_meta for p in blank.parameters())
    slope_fx.load_pretrained(tmp_path, blank)
    with torch.no_grad():
        assert torch.equal(blank(ids).logits, expected)
