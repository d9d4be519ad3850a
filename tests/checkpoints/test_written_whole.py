"""A checkpoint is written whole or not at all, and nothing that isn't one is overwritten."""

import contextlib
import copy
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

import models
import slope_fx
from checkpoint_cases import BACKEND, assert_same, trained
from slope_fx.checkpoints import files as files_module
from slope_fx.checkpoints.manifest import MANIFEST


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
    # A process of a restarted container may have the host's name and the id of the dead one.
    monkeypatch.setattr(files_module, "_PROCESS", "restarted")
    host, beyond_all_ids = files_module._writer().split("-")[0], 2**22 + 1
    (tmp_path / f".c.partial-{host}-{beyond_all_ids}-0123").mkdir()
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


class Tokenizer:
    """Writes files of other kinds than most, some of them into a folder."""

    def save_pretrained(self, folder):
        (Path(folder) / "source.spm").write_bytes(b"\x00\x01")
        (Path(folder) / "additional_chat_templates").mkdir()
        (Path(folder) / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")


def test_all_files_of_a_tokenizer_belong_to_the_checkpoint(tmp_path):
    model, _ = trained(rank=None)
    for _ in range(2):
        path = slope_fx.save_pretrained(model, tmp_path / "c", tokenizer=Tokenizer())
    slope_fx.checkpoints.verify(path)
    slope_fx.load_pretrained(path, **BACKEND)
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ other }}")
    with pytest.raises(slope_fx.errors.CheckpointError, match=r"tools\.jinja"):
        slope_fx.checkpoints.verify(path)


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
