"""What is saved comes back bit for bit, of every kind of model, and without pickle."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import models
import slope_fx
from checkpoint_cases import BACKEND, assert_same, logits, trained
from strategies import patterns


@settings(max_examples=8)
@given(data=st.data())
def test_comes_back_bit_for_bit(data, tmp_path_factory):
    """Any model, pattern, dtype, rank and shard size, extreme values among them."""
    kind = data.draw(st.sampled_from(list(models.TRANSFORMERS)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    rank = data.draw(st.sampled_from([None, 1, 5]))
    model = models.TRANSFORMERS[kind]().to(dtype)
    slope_fx.compile(model, data.draw(patterns), adapter_rank=rank, **BACKEND)
    weight = next(iter(slope_fx.sparse_weights(model).values()))
    with torch.no_grad():
        special = torch.tensor([float("nan"), float("inf"), -0.0, 0.0])
        weight.values.view(-1)[:4] = special
    path = tmp_path_factory.mktemp("any") / "checkpoint"
    slope_fx.save_pretrained(model, path, max_shard_size=data.draw(st.integers(2_000, 200_000)))
    loaded = slope_fx.load_pretrained(path, **BACKEND)
    assert_same(loaded, model)
    assert not loaded.training
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in model.parameters()]
    assert str(slope_fx.explain(loaded)) == str(slope_fx.explain(model))
    assert slope_fx.checkpoints.verify(path).patterns == {str(weight.pattern): len(
        slope_fx.sparse_weights(model))}  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("bert", marks=pytest.mark.full)])
def test_computes_the_same(kind, tmp_path):
    """The adapters take part after loading if they did when it was saved."""
    model, _ = trained(kind)
    want = logits(model)
    loaded = slope_fx.load_pretrained(slope_fx.save_pretrained(model, tmp_path / "c"), **BACKEND)
    assert torch.equal(logits(loaded), want)
    half = slope_fx.load_pretrained(tmp_path / "c", dtype="bfloat16", **BACKEND)
    kinds = {p.dtype for p in half.parameters()}
    assert kinds == {torch.bfloat16, torch.uint8}
    torch.testing.assert_close(logits(half).float(), want, rtol=0.1, atol=0.1)


def test_a_model_of_ones_own(tmp_path):
    """With ``model=``: shared weights stay shared, buffers come back, a wrong model is refused."""

    class Net(nn.Module):
        def __init__(self, width=16):
            super().__init__()
            self.first, self.mid = nn.Linear(8, width), nn.Linear(width, width)
            self.again, self.head = nn.Linear(width, width), nn.Linear(width, 4)
            self.again.weight = self.mid.weight
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("scratch", torch.ones(2), persistent=False)

        def forward(self, x):
            return self.head(self.again(self.mid(self.first(x)).relu()).relu())

    def made(seed, **more):
        torch.manual_seed(seed)
        return Net(**more)

    x = torch.randn(5, 8)
    model = slope_fx.compile(made(0), "1:4", adapter_rank=2, example_inputs=x, **BACKEND)
    model.seen.fill_(7)
    path = slope_fx.save_pretrained(model, tmp_path / "c")
    with pytest.raises(slope_fx.errors.CheckpointError, match="pass model="):
        slope_fx.load_pretrained(path, **BACKEND)
    loaded = slope_fx.load_pretrained(path, made(1), **BACKEND)
    assert_same(loaded, model)
    assert loaded.mid.weight_values is loaded.again.weight_values
    assert loaded.seen == 7
    assert torch.equal(loaded(x), model(x))
    assert loaded.training

    def untied():
        net = made(1)
        net.again.weight = nn.Parameter(net.mid.weight.detach().clone())
        return net

    for wrong, words in ((made(1, width=32), "has shape"), (untied(), "are shared"),
                         (nn.Sequential(nn.Linear(8, 8)), "has none")):  # fmt: skip
        before = copy.deepcopy(wrong.state_dict())
        with pytest.raises(slope_fx.errors.CheckpointError, match=words):
            slope_fx.load_pretrained(path, wrong, **BACKEND)
        assert {n: v.tolist() for n, v in wrong.state_dict().items()} == {
            n: v.tolist() for n, v in before.items()
        }


def test_experts_come_back(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model = slope_fx.compile(MixtralForCausalLM(config), "2:4", adapter_rank=2, **BACKEND)
    assert any(weight.stack == 4 for weight in slope_fx.sparse_weights(model).values())
    loaded = slope_fx.load_pretrained(slope_fx.save_pretrained(model, tmp_path / "c"), **BACKEND)
    assert_same(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_shards_and_files(saved):
    model, path = saved
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2
    names = {name for shard in shards for name in load_file(shard)}
    assert "lm_head.weight" not in names  # shared with the embedding, stored once
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert (path / "generation_config.json").exists()
    masks = [load_file(shard)[n] for shard in shards for n in load_file(shard) if "bits" in n]
    assert all(mask.dtype == torch.uint8 for mask in masks)
    loaded = slope_fx.load_pretrained(path, **BACKEND)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()


def test_transformers_does_not_take_it_for_a_dense_model(saved):
    """It would find most weights missing, and make them up."""
    opened = models.GPT2LMHeadModel.from_pretrained(saved[1], local_files_only=True)
    assert_same(opened, saved[0])


def test_a_tokenizer_goes_along(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = {"[UNK]": 0, "to": 1, "be": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]"
    )
    model, _ = trained()
    path = slope_fx.save_pretrained(model, tmp_path / "c", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(path).get_vocab() == words
    with pytest.raises(slope_fx.errors.CheckpointError, match="tokenizer is a str"):
        slope_fx.save_pretrained(model, tmp_path / "c", tokenizer="gpt2")


def test_nothing_is_unpickled(saved, monkeypatch):
    def refuse(*arguments, **more):
        raise AssertionError("something was pickled")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    model = slope_fx.load_pretrained(saved[1], **BACKEND)
    optimizer = torch.optim.AdamW(model.parameters())
    slope_fx.load_training(saved[1], {"optimizer": optimizer})
    path = saved[1].parent / "unpickled"
    slope_fx.save_pretrained(model, path, training={"optimizer": optimizer})
    for file in path.iterdir():
        assert file.suffix in (".json", ".safetensors"), file


def test_what_is_frozen_stays_frozen_and_casts_stay_cast(tmp_path):
    model, _ = trained("llama")
    model.to(torch.bfloat16)
    model.model.embed_tokens.weight.requires_grad_(False)
    weight = next(iter(slope_fx.sparse_weights(model).values()))
    weight.values.requires_grad_(False)
    loaded = slope_fx.load_pretrained(slope_fx.save_pretrained(model, tmp_path / "c"), **BACKEND)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == frozen
    assert {n: b.dtype for n, b in loaded.named_buffers()} == {
        n: b.dtype for n, b in model.named_buffers()
    }
    assert torch.equal(logits(loaded), logits(model))
