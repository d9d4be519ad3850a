"""The rest of a run, such as its optimizer: what is saved with a checkpoint comes back exactly."""

import io
import json
import os
import random
from collections import Counter, OrderedDict

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulefree import AdamWScheduleFree
from torch import nn

import models
import slope_fx
from checkpoint_cases import BACKEND, trained
from models import batch, loss_of
from slope_fx.checkpoints import TrainingState, randoms

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
    from slope_fx.checkpoints.trees import decode, encode

    tensors = {}
    text = json.dumps(encode(tree, "tree", tensors))
    assert repr(decode(json.loads(text), lambda _, name: tensors[name])) == repr(tree)


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


def test_an_optimizer_made_before_loading_is_told(tmp_path):
    def net():
        return nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])

    x = torch.ones(2, 16)
    model = slope_fx.compile(net(), "2:4", example_inputs=x, **BACKEND)
    path, fresh = slope_fx.save_pretrained(model, tmp_path / "c"), net()
    optimizer = torch.optim.SGD(fresh.parameters(), lr=1)
    slope_fx.load_pretrained(path, fresh, **BACKEND)
    with pytest.warns(
        slope_fx.errors.TrainingWarning, match=r"SGD was made before slope_fx.load.* 6 parameters"
    ):
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


def test_only_the_files_of_the_state_are_checked(saved, tmp_path):
    """``load_pretrained`` checks those of the model, and ranks share that."""
    model, _ = saved
    optimizer = torch.optim.SGD(model.parameters(), 1)
    path = slope_fx.save_pretrained(model, tmp_path / "c", training={"optimizer": optimizer})
    of_model, of_state = path / "model.safetensors", path / "training.json"
    of_model.write_bytes(of_model.read_bytes()[:-1] + b" ")
    slope_fx.load_training(path, {"optimizer": optimizer})
    of_state.write_text(of_state.read_text().replace(": ", ":\t", 1))  # the same, for JSON
    with pytest.raises(slope_fx.errors.CheckpointError, match=r"training\.json is not what was"):
        slope_fx.load_training(path, {"optimizer": optimizer})
    slope_fx.load_training(path, {"optimizer": optimizer}, verify=False)


def test_random_states_of_other_devices_are_told(monkeypatch):
    states = randoms.random_states()
    states["cuda"] = ["00"] * (torch.cuda.device_count() + 1)
    with pytest.warns(slope_fx.errors.TrainingWarning, match=r"states of \d+ CUDA devices, and"):
        randoms.set_random_states(states)


def test_a_schedule_of_rates_is_no_schedule():
    model, _ = trained(rank=None)
    optimizer = torch.optim.SGD(model.parameters(), 1)
    rates = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(slope_fx.errors.ArgumentError, match="schedule is a ConstantLR; it must be"):
        TrainingState(model, optimizer, rates)
    TrainingState(model, optimizer, rates=rates)


def test_a_schedule_free_optimizer_is_saved_in_its_other_mode():
    """Its authors ask for ``eval()`` before a checkpoint. Idle adapters have no state then."""
    model = slope_fx.compile(models.gpt2(), adapter_rank=4, **BACKEND)
    optimizer = AdamWScheduleFree(model.parameters(), lr=1e-2)
    optimizer.train()
    slope_fx.Schedule(model, 10)
    loss_of(model, batch(0)).backward()
    optimizer.step()
    optimizer.eval()
    found = TrainingState(model, optimizer).state_dict()["optimizer"]
    assert any("lora_B" in name for name in found)
    assert not optimizer.param_groups[0]["train_mode"]
