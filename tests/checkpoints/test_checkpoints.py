"""Checkpoints: what is saved comes back bit for bit, and nothing that isn't whole is loaded."""

import contextlib
import copy
import io
import json
import os
import pickle
import random
import shutil
import threading
from collections import Counter, OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import models
import slope_fx
from models import batch, loss_of
from slope_fx.checkpoints import files as files_module
from slope_fx.checkpoints.manifest import FORMAT_VERSION, MANIFEST, digest_of
from strategies import patterns

BACKEND = {"backend": "eager", "on_fallback": "error"}


def trained(kind="gpt2", sparsity="2:4", rank=4, steps=2, dtype=torch.float32):
    """A model in its adapter phase, with the parts of its run."""
    model = models.TRANSFORMERS[kind]().to(dtype)
    slope_fx.compile(model, sparsity, adapter_rank=rank, **BACKEND)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = slope_fx.Schedule(model, steps, **({"adapter_start": 0.5} if rank else {}))
    for step in range(steps):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, {"optimizer": optimizer, "schedule": schedule}


def assert_same(got: nn.Module, want: nn.Module) -> None:
    assert list(got.state_dict()) == list(want.state_dict())
    for name, value in want.state_dict().items():
        assert got.state_dict()[name].dtype == value.dtype, name
        torch.testing.assert_close(
            got.state_dict()[name], value, rtol=0, atol=0, equal_nan=True, msg=name
        )


@torch.no_grad()
def logits(model):
    model.eval()
    return model(input_ids=batch(9)).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and its checkpoint, not to be changed."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    model, parts = trained()
    slope_fx.save_pretrained(model, path, training=parts, max_shard_size=40_000)
    return model, path


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


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
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
    with pytest.raises(slope_fx.errors.StateError):
        slope_fx.load_pretrained(path, loaded, **BACKEND)


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


def _edit_manifest(path, change):
    """Edit it as somebody would who knows how to: with its digest."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    manifest["sha256"] = digest_of(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def _edit_tensors(path, change):
    """Change a file of tensors, and the manifest's hash with it: only the content is wrong."""
    file = sorted(path.glob("slope_fx*.safetensors"))[0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    size, digest = file.stat().st_size, files_module.sha256(file)
    _edit_manifest(path, lambda m: m["files"][file.name].update(bytes=size, sha256=digest))


def _first(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


def _all_kept(tensors):
    tensors[_first(tensors, "forward_bits")].fill_(255)


def _shifted(tensors):
    bits = tensors[_first(tensors, "backward_bits")]
    bits.fill_(255)


DAMAGE = {
    "a shard is missing": (lambda p: sorted(p.glob("*.safetensors"))[0].unlink(), "lacks"),
    "a shard is truncated": (
        lambda p: os.truncate(sorted(p.glob("*.safetensors"))[1], 2000), "truncated",
    ),
    "a bit is flipped": (
        lambda p: _flip(sorted(p.glob("slope_fx*.safetensors"))[0]), "SHA-256",
    ),
    "a shard too many": (
        lambda p: save_file({"x": torch.ones(1)}, p / "more.safetensors"), "not listed",
    ),
    "the configuration was changed": (
        lambda p: (p / "config.json").write_text("{}"), "bytes where",
    ),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "no slope_fx.json"),
    "half a manifest": (lambda p: os.truncate(p / MANIFEST, 300), "not a manifest"),
    "a newer format": (
        lambda p: _edit_manifest(p, lambda m: m.update(format_version=FORMAT_VERSION + 1)),
        "Upgrade slope_fx",
    ),
    "an edited manifest": (
        lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text().replace("2:4", "4:8")),
        "was edited",
    ),
    "a file elsewhere": (
        lambda p: _edit_manifest(p, lambda m: m["tensors"].update(
            {n: f"../{p.name}/{f}" for n, f in m["tensors"].items()})),
        "isn't among its files",
    ),
    "a scale that is none": (
        lambda p: _edit_manifest(p, lambda m: [
            linear.update(scale=float("nan")) for linear in m["linears"] if linear["pattern"]]),
        "damaged",
    ),
    "a linear twice": (
        lambda p: _edit_manifest(p, lambda m: m["linears"].append(m["linears"][1])), "twice",
    ),
    "no layout": (
        lambda p: _edit_manifest(p, lambda m: m["linears"][2].update(layout=None)), "damaged",
    ),
    "a class that is none": (
        lambda p: _edit_manifest(p, lambda m: m["model"].update({"class": "pipeline"})),
        "doesn't have",
    ),
    "another format": (lambda p: _edit_manifest(p, lambda m: m.update(format="x")), "not ours"),
    "a part of the manifest is gone": (
        lambda p: _edit_manifest(p, lambda m: m["linears"][1].pop("scopes")), "damaged",
    ),
    "another pattern": (
        lambda p: _edit_manifest(
            p, lambda m: [
                linear.update(pattern="1:2") for linear in m["linears"] if linear["pattern"]
            ],
        ),
        "should be 1:2",
    ),
    "a pattern of another size": (
        lambda p: _edit_manifest(
            p, lambda m: [
                linear.update(pattern="1:4") for linear in m["linears"] if linear["pattern"]
            ],
        ),
        "model needs",
    ),
    "a mask that isn't N:M": (lambda p: _edit_tensors(p, _all_kept), "should be 2:4"),
    "a backward mask that isn't N:M": (lambda p: _edit_tensors(p, _shifted), "backward_bits"),
    "a tensor is missing": (
        lambda p: _edit_tensors(p, lambda t: t.pop(_first(t, "weight_values"))), "lacks the tensor",
    ),
    "a tensor too many": (
        lambda p: _edit_tensors(p, lambda t: t.update(more=torch.ones(2))), "doesn't list",
    ),
    "a tensor without a place": (
        lambda p: (
            _edit_tensors(p, lambda t: t.update(more=torch.ones(2))),
            _edit_manifest(p, lambda m: m["tensors"].update(
                more=sorted(f.name for f in p.glob("slope_fx*.safetensors"))[0])),
        ),
        "no place",
    ),
    "another rank": (
        lambda p: _edit_manifest(
            p, lambda m: [linear.update(rank=2) for linear in m["linears"] if linear["pattern"]]
        ),
        "model needs",
    ),
    "no adapter in a layer": (
        lambda p: _edit_manifest(
            p, lambda m: [linear.update(rank=None) for linear in m["linears"] if linear["pattern"]]
        ),
        "no place",
    ),
}  # fmt: skip


def _flip(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole_is_refused(damage, saved, tmp_path):
    """Nothing is loaded in part: an error says what is wrong, and names the file."""
    path = tmp_path / "copy"
    shutil.copytree(saved[1], path)
    hurt, words = DAMAGE[damage]
    hurt(path)
    with pytest.raises(slope_fx.errors.CheckpointError, match=words):
        slope_fx.load_pretrained(path, **BACKEND)
    if "place" not in words and "have" not in words:  # that takes a model to tell
        with pytest.raises(slope_fx.errors.CheckpointError, match=words):
            slope_fx.checkpoints.verify(path)


def test_shards_and_files(saved):
    model, path = saved
    shards = sorted(path.glob("slope_fx-*.safetensors"))
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
    with pytest.raises(OSError, match="no file named"):
        models.GPT2LMHeadModel.from_pretrained(saved[1], local_files_only=True)


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


# --- written whole or not at all ---


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours may see it as an error."""


@contextlib.contextmanager
def dying_at(call: int, monkeypatch):
    """The process "dies" at the given call of what touches the disk, and cleans up nothing."""
    count = 0

    def counted(function):
        def run(*arguments, **more):
            nonlocal count
            count += 1
            if count == call:
                raise Killed
            return function(*arguments, **more)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "fsync", counted(os.fsync))
        patch.setattr(files_module.os, "rename", counted(os.rename))
        patch.setattr(files_module, "_exchange", counted(files_module._exchange))
        patch.setattr(files_module.shutil, "rmtree", lambda *a, **k: None)
        patch.setattr(os, "replace", counted(os.replace))
        with contextlib.suppress(Killed):
            yield
    assert count >= call


@pytest.mark.parametrize("exists", [False, True], ids=["new", "over an earlier one"])
def test_killed_at_any_moment_the_last_good_one_remains(exists, tmp_path, monkeypatch):
    model, _ = trained(rank=None)
    path = tmp_path / "c"
    if exists:
        slope_fx.save_pretrained(model, path)
    before = sorted(os.listdir(path)) if exists else None
    old = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(1)
    new = False
    for call in range(1, 100):
        try:
            with dying_at(call, monkeypatch):
                slope_fx.save_pretrained(model, path)
        except AssertionError:
            break  # it had fewer calls than that: it went through
        if not exists and not path.exists():
            continue
        loaded = slope_fx.load_pretrained(path, **BACKEND).state_dict()
        name = next(iter(old))
        new = torch.equal(loaded[name], model.state_dict()[name])
        want = model.state_dict() if new else old
        assert all(torch.equal(loaded[n], want[n]) for n in want)
        assert before is None or sorted(os.listdir(path)) == before
        if new:
            break
    assert call > 5
    assert_same(slope_fx.load_pretrained(path, **BACKEND), model)
    # What a dead process left goes with the next write; of one that lives, it may be at work.
    left = [name for name in os.listdir(tmp_path) if name != "c"]
    assert left
    slope_fx.save_pretrained(model, path)
    assert sorted(os.listdir(tmp_path)) == sorted([*left, "c"])
    monkeypatch.setattr(files_module, "is_running", lambda pid: False)
    slope_fx.save_pretrained(model, path)
    assert os.listdir(tmp_path) == ["c"]


def test_writers_do_not_disturb_each_other(tmp_path):
    """Two threads over one path: whoever reads finds one or the other, whole."""
    model, _ = trained(rank=None)
    path = slope_fx.save_pretrained(model, tmp_path / "c")
    failures = []

    def write():
        for _ in range(10):
            try:
                slope_fx.save_pretrained(model, path)
            except Exception as error:
                failures.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert (path / MANIFEST).exists()
    assert not failures
    slope_fx.checkpoints.verify(path)
    assert os.listdir(tmp_path) == ["c"]


def test_where_folders_cannot_be_swapped(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "_exchange", lambda one, other: False)
    model, _ = trained(rank=None)
    path = slope_fx.save_pretrained(model, tmp_path / "c")
    slope_fx.save_pretrained(model, path)
    assert os.listdir(tmp_path) == ["c"]
    os.rename(path, files_module.previous_of(path))  # killed between the two renames
    with pytest.raises(slope_fx.errors.CheckpointError, match=r"\.c\.previous"):
        slope_fx.load_pretrained(path)


def test_other_peoples_folders_are_left_alone(tmp_path, monkeypatch):
    model, _ = trained(rank=None)
    (tmp_path / "thesis.tex").write_text("years of work")
    mine = slope_fx.save_pretrained(model, tmp_path / "mine")
    (mine / "notes.md").write_text("more of it")
    with pytest.raises(slope_fx.errors.CheckpointError, match=r"holds notes\.md"):
        slope_fx.save_pretrained(model, mine)
    shutil.rmtree(mine)
    with pytest.raises(slope_fx.errors.CheckpointError, match="would be deleted"):
        slope_fx.save_pretrained(model, tmp_path)
    with pytest.raises(slope_fx.errors.CheckpointError, match="must be a folder"):
        slope_fx.save_pretrained(model, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(slope_fx.errors.StateError):
        slope_fx.save_pretrained(models.gpt2(), tmp_path / "c")
    with pytest.raises(slope_fx.errors.CheckpointError, match="max_shard_size"):
        slope_fx.save_pretrained(model, tmp_path / "c", max_shard_size="many")
    assert os.listdir(tmp_path) == ["thesis.tex"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(slope_fx.errors.CheckpointError, match="working directory"):
        slope_fx.save_pretrained(model, ".")


# --- the rest of a run ---

_leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.sampled_from([torch.ones(2, dtype=torch.int64), torch.zeros(()), torch.tensor([True])]),
)  # fmt: skip
_trees = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), inner, max_size=3),
    ),
    max_leaves=10,
)


@settings(max_examples=60)
@given(tree=_trees)
def test_plain_data_comes_back(tree):
    from slope_fx.checkpoints.training import _decode, _encode

    tensors = {}
    text = json.dumps(_encode(tree, "tree", tensors))
    assert repr(_decode(json.loads(text), tensors)) == repr(tree)


def test_a_run_goes_on_exactly(tmp_path):
    """Optimizer, rates, Schedule, GradScaler and the three random states."""
    model, parts = trained(steps=4)
    parts["rates"] = torch.optim.lr_scheduler.OneCycleLR(parts["optimizer"], 0.1, total_steps=9)
    parts["scaler"] = torch.amp.GradScaler("cpu")
    random.seed(3)
    numpy.random.seed(4)
    torch.manual_seed(5)
    history = {"losses": [0.5, float("nan")], "batch": (3, numpy.int64(7)),
               "best": numpy.float64(1.5)}  # fmt: skip
    path = slope_fx.save_pretrained(model, tmp_path / "c", training={**parts, **history})
    draws = random.random(), numpy.random.rand(), torch.rand(3)

    loaded = slope_fx.load_pretrained(path, **BACKEND)
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-2)
    again = {
        "optimizer": optimizer,
        "schedule": slope_fx.Schedule(loaded, 4, 0.5),
        "rates": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9),
        "scaler": torch.amp.GradScaler("cpu"),
    }
    torch.rand(7)
    rest = slope_fx.load_training(path, again)
    assert repr(rest) == "{'losses': [0.5, nan], 'batch': (3, 7), 'best': 1.5}"
    got = random.random(), numpy.random.rand(), torch.rand(3)
    assert got[:2] == draws[:2]
    assert torch.equal(got[2], draws[2])
    for name, part in parts.items():
        one, other = io.BytesIO(), io.BytesIO()
        torch.save(part.state_dict(), one)
        torch.save(again[name].state_dict(), other)
        assert repr(part.state_dict()) == repr(again[name].state_dict()), name


def test_tensors_of_like_names_are_kept_apart(tmp_path):
    model, _ = trained(rank=None)
    tricky = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, 1: torch.ones(2), "1": 3,
              "c": Counter({3: 2}), "o": OrderedDict(z=1)}  # fmt: skip
    path = slope_fx.save_pretrained(
        model, tmp_path / "c", training={"x": tricky, "__metadata__": torch.ones(3)}
    )
    got = slope_fx.load_training(path)
    assert repr(got["x"]) == repr(tricky)
    assert torch.equal(got["__metadata__"], torch.ones(3))


def test_training_state_is_loaded_all_or_not_at_all(tmp_path):
    model, _ = trained(rank=None)
    values = [p for p in model.parameters() if p.requires_grad]
    one, other = torch.optim.SGD(values, lr=0.5), torch.optim.SGD(values[:3], lr=0.5)
    path = slope_fx.save_pretrained(model, tmp_path / "c", training={"a": one, "b": other})
    first, wrong = torch.optim.SGD(values, lr=0.1), torch.optim.SGD(values, lr=0.1)
    with pytest.raises(slope_fx.errors.CheckpointError, match=r"training\['b'\], a SGD"):
        slope_fx.load_training(path, {"a": first, "b": wrong})
    assert first.param_groups[0]["lr"] == wrong.param_groups[0]["lr"] == 0.1


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


def test_an_optimizer_made_before_loading_is_told(tmp_path):
    def net():
        return nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])

    x = torch.ones(2, 16)
    model = slope_fx.compile(net(), "2:4", example_inputs=x, **BACKEND)
    path, fresh = slope_fx.save_pretrained(model, tmp_path / "c"), net()
    optimizer = torch.optim.SGD(fresh.parameters(), lr=1)
    slope_fx.load_pretrained(path, fresh, **BACKEND)
    with pytest.warns(slope_fx.errors.TrainingWarning, match="SGD was made before"):
        optimizer.step()


def test_mistakes_with_training_state(saved, tmp_path):
    model, path = saved
    for training, words in (
        ({"model": nn.Linear}, "pickle"),
        ({"x": {"deep": [object()]}}, r"x\.deep\.0 is a object"),
        ({"x": {(1, 2): 3}}, "has the key"),
        ([1], "must map names"),
        ({"random_states": 1}, "reserved"),
    ):
        with pytest.raises(slope_fx.errors.CheckpointError, match=words):
            slope_fx.save_pretrained(model, tmp_path / "c", training=training)
    assert os.listdir(tmp_path) == []
    with pytest.raises(slope_fx.errors.CheckpointError, match="saved with"):
        slope_fx.load_training(path, {"optimiser": torch.optim.SGD(model.parameters(), 1)})
    with pytest.raises(slope_fx.errors.CheckpointError, match="no load_state_dict"):
        slope_fx.load_training(path, {"optimizer": 3})
    slope_fx.save_pretrained(model, tmp_path / "c")
    with pytest.raises(slope_fx.errors.CheckpointError, match="no training state"):
        slope_fx.load_training(tmp_path / "c")
    with pytest.raises(slope_fx.errors.ArgumentError, match="dtype='int8'"):
        slope_fx.load_pretrained(path, dtype="int8")


def test_killed_and_resumed(tmp_path, monkeypatch):
    """The benchmark of thirty kills, with three."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import kill_and_resume

    result = kill_and_resume.kill_and_resume(tmp_path, steps=8, kills=3, seed=1)
    assert result["identical"]
    assert result["kills_in_sparse_phase"] + result["kills_in_adapter_phase"] == 3
