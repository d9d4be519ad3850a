"""``slope-fx convert`` writes all of a target or nothing, and carries the tokenizer."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import models
import slope_fx
from slope_fx import cli
from slope_fx.checkpoints import TrainingState, verify

WORDS = {"[UNK]": 0, "to": 1, "be": 2}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A model of each kind, with a tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("kinds")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(WORDS, unk_token="[UNK]")), unk_token="[UNK]"
    )
    model = models.awake(models.llama(), backend=None)
    slope_fx.save_pretrained(model, folder / "sparse", tokenizer=tokenizer)
    for source, target, more in (("sparse", "dense", ["--to", "dense"]),
                                 ("sparse", "dcp", ["--to", "dcp"]),
                                 ("sparse", "frozen", ["--freeze"])):  # fmt: skip
        assert cli.main(["convert", str(folder / source), str(folder / target), *more]) == 0
    return folder


WAYS = [("sparse", "dense"), ("sparse", "peft"), ("sparse", "dcp"), ("dcp", "sparse"),
        ("dense", "sparse")]  # fmt: skip


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("source", "to"), WAYS)
def test_a_disk_that_is_full_at_the_end(source, to, kinds, tmp_path, monkeypatch, capsys):
    """The tokenizer comes last; nothing is left, and the same command works later."""
    command = ["convert", str(kinds / source), str(tmp_path / "c"), "--to", to]
    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
        assert cli.main([*command, "--json"]) == cli.FAILED
        told = capsys.readouterr()
        assert "No space left on device" in json.loads(told.out)["message"]
        assert "Traceback" not in told.err
        assert list(tmp_path.iterdir()) == []
    assert cli.main(command) == 0
    where = tmp_path / ("c-base" if to == "peft" else "c")
    assert AutoTokenizer.from_pretrained(where).get_vocab() == WORDS


def test_a_full_disk_within_dcp(kinds, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    command = ["convert", str(kinds / "sparse"), str(tmp_path / "c"), "--to", "dcp"]
    assert cli.main(command) == cli.FAILED
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_folder_of_dcp(damage, kinds, tmp_path, capsys):
    shutil.copytree(kinds / "dcp", tmp_path / "dcp")
    for file in (tmp_path / "dcp").glob("*.distcp"):
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:100])
    command = ["convert", str(tmp_path / "dcp"), str(tmp_path / "c"), "--to", "sparse"]
    assert cli.main(command) == cli.FAILED
    assert f"{tmp_path / 'dcp'} can't be read by DCP: " in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_through_dcp_and_back_nothing_is_lost(kinds, tmp_path):
    assert cli.main(["convert", str(kinds / "dcp"), str(tmp_path / "c"), "--to", "sparse"]) == 0
    verify(tmp_path / "c")
    names = {p.name for p in (kinds / "sparse").iterdir()}
    assert names <= {p.name for p in (tmp_path / "c").iterdir()}
    assert AutoTokenizer.from_pretrained(tmp_path / "c").get_vocab() == WORDS
    model = slope_fx.load_pretrained(tmp_path / "c", backend=None)
    state = {"training": TrainingState(model)}
    dcp.load(state, checkpoint_id=kinds / "dcp", no_dist=True)


def test_a_frozen_model_has_no_training_state(kinds, tmp_path, capsys):
    command = ["convert", str(kinds / "frozen"), str(tmp_path / "c"), "--to", "dcp"]
    assert cli.main(command) == cli.FAILED
    assert "is a frozen model, which no training state can hold" in capsys.readouterr().err
    assert not Path(tmp_path / "c").exists()
