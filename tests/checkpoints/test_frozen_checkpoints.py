"""Frozen models: saved, loaded from either kind of checkpoint, and refused where models train."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
import slope_fx
from models import batch, gpt2, llama
from slope_fx.checkpoints import TrainingState, load_dense, manifest, read_manifest, verify
from slope_fx.convert import convert
from slope_fx.errors import ArgumentError, CheckpointError, StateError
from slope_fx.frozen import FrozenWeight
from slope_fx.planning.plan import sparse_plans

SHARDS = {"one file": "5GB", "many files": "20KB"}


def awake(make=llama) -> nn.Module:
    return models.awake(make(), scale=0.5, backend=None)


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batch()).logits.double()


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def same(one: nn.Module, other: nn.Module) -> None:
    """Check that all tensors of two models are equal, with their dtypes."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def file_of(tensor: torch.Tensor) -> str:
    """The file that the memory of a tensor is a mapping of; "" for memory without a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *about = line.split()
        first, last = (int(part, 16) for part in addresses.split("-"))
        if first <= tensor.data_ptr() < last:
            return about[4] if len(about) > 4 and about[4].startswith("/") else ""
    return ""


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("make", [pytest.param(gpt2, marks=pytest.mark.full), llama])
def test_both_kinds_of_checkpoints_give_what_freeze_gives(make, dtype, shards, tmp_path):
    model = awake(make)
    dense = slope_fx.densify(model)
    slope_fx.save_pretrained(model, tmp_path / "training", max_shard_size=SHARDS[shards])
    want = slope_fx.freeze(copy.deepcopy(model), dtype=dtype)
    assert gap(logits_of(want), logits_of(dense)) < (1e-5 if dtype is None else 0.05)
    of_training = slope_fx.load_pretrained(
        tmp_path / "training", frozen=True, dtype=dtype, backend=None
    )
    same(of_training, want)
    slope_fx.save_pretrained(want, tmp_path / "frozen", max_shard_size=SHARDS[shards])
    told = slope_fx.load_pretrained(tmp_path / "frozen", backend=None)
    same(told, want)
    assert gap(logits_of(told), logits_of(want)) < (1e-6 if dtype is None else 0.02)
    for loaded in (of_training, told):
        weights = slope_fx.sparse_weights(loaded).values()
        assert all(isinstance(weight, FrozenWeight) for weight in weights)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert not loaded.training
    assert (len(list((tmp_path / "frozen").glob("model*.safetensors"))) > 1) == (
        shards == "many files"
    )


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_quantised_values(values, tmp_path):
    want = slope_fx.freeze(awake(), dtype="bfloat16", values=values)
    slope_fx.save_pretrained(want, tmp_path)
    loaded = slope_fx.load_pretrained(tmp_path, backend=None)
    same(loaded, want)
    assert slope_fx.record.record_of(loaded).frozen == slope_fx.record.record_of(want).frozen
    assert torch.equal(logits_of(loaded), logits_of(want))
    wide = slope_fx.load_pretrained(tmp_path, dtype="float32", backend=None)
    # The product rounds its inputs to 16-bit integers.
    assert gap(logits_of(wide), logits_of(slope_fx.densify(wide))) < 2e-4
    assert gap(logits_of(wide), logits_of(slope_fx.densify(want))) < 0.05  # it is bfloat16
    assert verify(tmp_path).frozen == values


def test_older_versions_refuse_a_frozen_model_and_read_one_that_trains(tmp_path, monkeypatch):
    model = awake()
    slope_fx.save_pretrained(model, tmp_path / "training")
    slope_fx.save_pretrained(slope_fx.freeze(model), tmp_path / "frozen")
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 3)
    read_manifest(tmp_path / "training")
    with pytest.raises(CheckpointError, match=r"format version 4.*Upgrade slope_fx"):
        read_manifest(tmp_path / "frozen")


def test_adapters_are_stored_with_their_scale_in_them(tmp_path):
    model = awake()
    name, weight = next(iter(slope_fx.sparse_weights(model).items()))
    scaled = weight.scale * weight.lora_B.detach().clone()
    slope_fx.save_pretrained(slope_fx.freeze(model), tmp_path)
    assert {entry.scale for entry in read_manifest(tmp_path).sparse.values()} == {1.0}
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored[f"{name}.weight_sparse.lora_B"], scaled)


def test_what_training_needs_is_not_read(tmp_path):
    model = slope_fx.compile(llama(), adapter_rank=4, backend=None)  # its adapters are idle
    want = slope_fx.freeze(copy.deepcopy(model))
    slope_fx.save_pretrained(model, tmp_path, training={"state": [torch.ones(3)]})
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("backward_bits"):
            tensor.fill_(255)
        elif "lora" in name:
            tensor.fill_(float("nan"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    data = json.loads((tmp_path / "slope_fx.json").read_text())
    size = (tmp_path / "model.safetensors").stat().st_size
    data["files"]["model.safetensors"]["bytes"] = size
    data["sha256"] = manifest.digest_of(data)
    (tmp_path / "slope_fx.json").write_text(json.dumps(data))
    (tmp_path / "training.safetensors").write_bytes(
        b"\0" * (tmp_path / "training.safetensors").stat().st_size
    )
    with pytest.raises(CheckpointError, match="backward_bits"):
        slope_fx.load_pretrained(tmp_path, verify=False, backend=None)
    loaded = slope_fx.load_pretrained(tmp_path, frozen=True, verify=False, backend=None)
    same(loaded, want)


@pytest.mark.parametrize("kind", ["training", "frozen"])
def test_parameters_are_mapped_from_the_file(kind, tmp_path):
    model = awake()
    if kind == "frozen":
        slope_fx.freeze(model)
    slope_fx.save_pretrained(model, tmp_path)
    loaded = slope_fx.load_pretrained(tmp_path, frozen=True, backend=None)
    copied = {n for n, p in loaded.named_parameters() if "model.safetensors" not in file_of(p)}
    factors = ("lora_B",) if kind == "frozen" else ("lora_A", "lora_B")  # their scale is put in
    assert copied == {n for n, _ in loaded.named_parameters() if n.endswith(factors)}
    cast = slope_fx.load_pretrained(tmp_path, frozen=True, dtype="bfloat16", backend=None)
    viewed = {n for n, p in cast.named_parameters() if file_of(p)}
    assert viewed == {n for n, _ in cast.named_parameters() if n.endswith("forward_bits")}
    trains = None if kind == "frozen" else slope_fx.load_pretrained(tmp_path, backend=None)
    assert trains is None or not any(file_of(p) for p in trains.parameters())


def test_the_file_may_be_replaced_and_deleted_afterwards(tmp_path):
    model = slope_fx.freeze(awake())
    slope_fx.save_pretrained(model, tmp_path / "a")
    loaded = slope_fx.load_pretrained(tmp_path / "a", backend=None)
    slope_fx.save_pretrained(loaded, tmp_path / "a")
    slope_fx.save_pretrained(loaded, tmp_path / "a")
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    same(loaded, model)


def test_a_model_of_ones_own(tmp_path):
    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, 8))

    model = slope_fx.compile(make(), backend=None)
    x = torch.randn(5, 32)
    with torch.no_grad():
        want = model(x)
    slope_fx.save_pretrained(model, tmp_path)
    given = make().eval()
    loaded = slope_fx.load_pretrained(tmp_path, given, frozen=True, backend=None)
    assert loaded is given
    with torch.no_grad():
        assert gap(loaded(x).double(), want.double()) < 1e-6


@pytest.mark.parametrize("kind", ["training", "frozen"])
def test_a_model_that_does_not_fit_is_left_as_it_was(kind, tmp_path):
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    slope_fx.compile(model, backend=None)
    if kind == "frozen":
        slope_fx.freeze(model)
    slope_fx.save_pretrained(model, tmp_path)
    # Its last layer, which is not sparse, differs: the sparse ones are installed before.
    other = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 9))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    classes = [type(module) for module in other.modules()]
    with pytest.raises(CheckpointError, match=r"3\."):
        slope_fx.load_pretrained(tmp_path, other, frozen=True, backend=None)
    assert [type(module) for module in other.modules()] == classes
    after = other.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    model = awake()
    slope_fx.save_pretrained(model, folder / "training", training={"state": 1})
    slope_fx.save_pretrained(slope_fx.freeze(model), folder / "frozen")
    return folder


FOR_TRAINING = {
    "Schedule": lambda model, folder: slope_fx.Schedule(model, 10),
    "compile": lambda model, folder: slope_fx.compile(model),
    "freeze": lambda model, folder: slope_fx.freeze(model),
    "TrainingState": lambda model, folder: TrainingState(model),
    "load_dense": lambda model, folder: load_dense(folder, model),
    "load into it": lambda model, folder: slope_fx.load_pretrained(folder / "training", model),
    "save a run": lambda model, folder: slope_fx.save_pretrained(
        model, folder / "run", training={"step": 1}
    ),
    "first_difference": lambda model, folder: slope_fx.debug.first_difference(model, batch()),
}


@pytest.mark.parametrize("what", FOR_TRAINING)
def test_what_is_for_training_refuses(what, checkpoints):
    model = slope_fx.load_pretrained(checkpoints / "frozen", backend=None)
    want = copy.deepcopy(model.state_dict())
    words = "compiled already" if what == "compile" else "frozen LlamaForCausalLM"
    with pytest.raises(StateError, match=words):
        FOR_TRAINING[what](model, checkpoints)
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    assert not (checkpoints / "run").exists()


def test_refusals_of_loading(checkpoints):
    with pytest.raises(StateError, match="frozen=False"):
        slope_fx.load_pretrained(checkpoints / "frozen", frozen=False)
    trains = slope_fx.load_pretrained(checkpoints / "training", backend=None)
    with pytest.raises(StateError, match="holds a frozen model"):
        slope_fx.load_pretrained(checkpoints / "frozen", trains)
    with pytest.raises(ArgumentError, match="frozen=True was given"):
        slope_fx.load_pretrained(checkpoints / "training", trains, frozen=True)
    with pytest.raises(ArgumentError, match="meta"):
        slope_fx.load_pretrained(checkpoints / "training", frozen=True, device="meta")
    with pytest.raises(CheckpointError, match="no training state"):
        slope_fx.load_training(checkpoints / "frozen")


@pytest.mark.parametrize("make", [gpt2, llama])
def test_copies(make):
    model = slope_fx.freeze(awake(make))
    want = logits_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(other, model)
        assert torch.equal(logits_of(other), want)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_dense_again(make, tmp_path):
    model = awake(make)
    want, dropped = logits_of(slope_fx.densify(model)), slope_fx.densify(model, "drop")
    slope_fx.save_pretrained(slope_fx.freeze(model), tmp_path / "frozen")
    loaded = slope_fx.load_pretrained(tmp_path / "frozen", backend=None)
    assert gap(logits_of(slope_fx.densify(loaded)), want) < 1e-5
    same(slope_fx.densify(loaded, "drop"), dropped)
    assert gap(logits_of(slope_fx.densify(loaded, "peft")), want) < 1e-5
    for to in ("dense", "peft"):
        convert(tmp_path / "frozen", tmp_path / to, to)
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert gap(logits_of(dense), want) < 1e-5
    assert not hasattr(dense.config, "quantization_config")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "peft-base"), dropped)


def test_explain_and_verify(tmp_path):
    model = slope_fx.freeze(awake(gpt2), dtype="bfloat16")
    weights = slope_fx.sparse_weights(model)
    report = slope_fx.explain(model)
    assert report.frozen
    for linear in report.sparse:
        weight = weights[linear.name]
        live = [weight.values, weight.forward_bits, weight.lora_A, weight.lora_B]
        assert linear.bytes_after == sum(tensor.nbytes for tensor in live)
        assert linear.bytes_before == 2 * weight.d_out * weight.d_in
        assert linear.rank == 4
        assert {route for _, route in linear.routes} <= {"stream", "panels", "dense"}
        assert not linear.reason
    assert "Frozen, for inference: float values." in str(report)
    assert "Adam" not in str(report)
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))) == report
    slope_fx.save_pretrained(model, tmp_path)
    told = verify(tmp_path)
    assert (told.frozen, told.training) == ("float", False)


def test_explain_gives_the_bytes_of_the_paper():
    model = slope_fx.freeze(slope_fx.compile(llama(), backend=None), dtype="bfloat16")
    for linear in slope_fx.explain(model).sparse:
        assert linear.bytes_after / linear.bytes_before == 0.5625


class Scaled(nn.Linear):
    """A linear whose forward is not the plain product: it reads its weight."""

    def forward(self, input):
        return 2 * nn.functional.linear(input, self.weight, self.bias)


def test_explain_names_layers_that_read_their_dense_weight():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), Scaled(32, 32), nn.Linear(32, 8))
    config = {"1": "2:4", "2": "2:4", "*": None}
    slope_fx.compile(model, config, example_inputs=torch.ones(2, 32), backend=None)
    report = slope_fx.explain(slope_fx.freeze(model))
    reasons = {linear.name: linear.reason for linear in report.sparse}
    assert reasons["1"] == ""
    assert reasons["2"] == "Scaled reads weight, which is made at each call"
    assert "1 layer reads its dense weight: 2." in report.note


DAMAGE = {
    "a flipped bit": (lambda f: _overwrite(f, -3), {}, "SHA-256"),
    "a truncated file": (lambda f: f.write_bytes(f.read_bytes()[:-64]), {}, "truncated"),
    "a missing file": (lambda f: f.unlink(), {}, "lacks"),
    "another mask": (lambda f: _another_mask(f), {"verify": False}, "where exactly 2 of each 4"),
}


def _overwrite(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


def _another_mask(file):
    tensors = load_file(file)
    bits = next(tensor for name, tensor in tensors.items() if name.endswith("forward_bits"))
    bits[-1, -1] ^= 1
    described = read_manifest(file.parent)
    save_file(tensors, file, metadata={"format": "pt"})
    files = {**described.files, file.name: (file.stat().st_size, "")}
    dataclasses.replace(described, files=files).write(file.parent)


@pytest.mark.parametrize("what", DAMAGE)
def test_damage(what, tmp_path):
    slope_fx.save_pretrained(slope_fx.freeze(awake()), tmp_path)
    damage, options, words = DAMAGE[what]
    damage(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        slope_fx.load_pretrained(tmp_path, backend=None, **options)


def test_scales_that_no_layer_has_are_refused(tmp_path):
    slope_fx.save_pretrained(slope_fx.freeze(awake(), values="int8"), tmp_path)
    described = read_manifest(tmp_path)
    name = sparse_plans(described.plans)[0].name
    entry = dataclasses.replace(described.sparse[name], dtype="int3")
    dataclasses.replace(described, sparse={**described.sparse, name: entry}).write(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name} has quantised values and dtype int3"):
        read_manifest(tmp_path)
