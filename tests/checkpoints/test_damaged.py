"""A checkpoint that isn't whole is refused: nothing of it is loaded, and an error says why."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import slope_fx
from checkpoint_cases import BACKEND
from slope_fx.checkpoints import files as files_module
from slope_fx.checkpoints.manifest import FORMAT_VERSION, MANIFEST, digest_of


def _edit_manifest(path, change):
    """Edit it as somebody would who knows how to: with its digest."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    manifest["sha256"] = digest_of(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def _edit_tensors(path, change):
    """Change a file of tensors, and the manifest's hash with it: only the content is wrong."""
    file = sorted(path.glob("model*.safetensors"))[0]
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
        lambda p: _flip(sorted(p.glob("model*.safetensors"))[0]), "SHA-256",
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
                more=sorted(f.name for f in p.glob("model*.safetensors"))[0])),
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
