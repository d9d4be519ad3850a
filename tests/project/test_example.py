"""The example as a user runs it, at a tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--layers", "2", "--width", "32", "--heads", "2", "--context", "32", "--batch-size", "2",
    "--vocab-size", "300", "--steps", "6", "--warmup", "2", "--eval-every", "3", "--eval-rows", "4",
    "--save-every", "3", "--adapter-start", "0.5", "--backward-mask-interval", "2",
    "--backend", "aot_eager", "--dropout", "0.1", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A little English of our own."""
    folder = tmp_path_factory.mktemp("text")
    sentence = "the quick brown fox jumps over a lazy dog while seven wizards brew potions"
    words = sentence.split()
    for name in ("one", "two"):
        lines = [" ".join(words[i % 13 :] + words[: (i * 5) % 13]) for i in range(300)]
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    return folder


def run(*arguments, fails=False):
    done = subprocess.run(
        [sys.executable, "examples/pretrain_gpt2.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done


def tensors(out):
    (checkpoint,) = out.glob("checkpoint-*")
    (weights,) = (f for f in checkpoint.glob("*.safetensors") if f.stem != "training")
    with safe_open(weights, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def losses(out):
    return [s["loss"] for s in json.loads((out / "log.json").read_text())["steps"]]


def test_help_shows_how():
    text = run("--help").stdout
    for word in ("--dense", "--resume", "--text-files", "--dataset", "--sparsity", "--device"):
        assert word in text


@pytest.mark.full
def test_run_interrupt_resume_and_dense(text, tmp_path):
    """Bit for bit: a run of six steps, and one that was stopped after three and went on."""
    data = ["--text-files", text / "*.txt", "--eval-files", text / "two.txt"]
    whole, parts, dense = tmp_path / "whole", tmp_path / "parts", tmp_path / "dense"
    done = run(*TINY, *data, "--out", whole)
    assert "the adapter phase begins" in done.stdout
    assert "held-out perplexity" in done.stdout
    assert "linears are sparse" in done.stdout
    assert (whole / "sample.txt").read_text() in done.stdout
    assert (whole / "loss.png").stat().st_size > 10_000
    log = json.loads((whole / "log.json").read_text())
    assert [s["phase"] for s in log["steps"]] == ["sparse"] * 3 + ["adapter"] * 3
    assert [e["step"] for e in log["evaluations"]] == [0, 3, 6]

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    stopped = subprocess.Popen(
        [sys.executable, "examples/pretrain_gpt2.py", *TINY, *map(str, data), "--out", str(parts)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    for line in stopped.stdout:
        # Printed by the evaluation after step 3, ahead of its checkpoint: wait for that.
        if "step 3: held-out" in line:
            break
    while not list(parts.glob("checkpoint-000003")):
        assert stopped.poll() is None
    stopped.kill()
    stopped.wait()
    assert "holds a run already" in run(*TINY, *data, "--out", parts, fails=True).stderr
    refused = run(*TINY, *data, "--out", parts, "--resume", "--lr", "0.1", fails=True)
    assert "its arguments have --lr 0.002, not 0.1" in refused.stderr
    resumed = run(*TINY, *data, "--out", parts, "--resume")
    assert "Going on from" in resumed.stdout
    assert losses(parts) == losses(whole)
    want = tensors(whole)
    assert all((tensors(parts)[key] == value).all() for key, value in want.items())
    assert any(key.endswith("weight_values") for key in want)
    assert any(key.endswith("lora_B") and value.any() for key, value in want.items())

    run(*TINY, *data, "--out", dense, "--dense")
    assert not any("weight_values" in key for key in tensors(dense))
    assert len(losses(dense)) == 6
    plotted = tmp_path / "both.png"
    subprocess.run(
        [sys.executable, "examples/plot_run.py", whole / "log.json", dense / "log.json",
         "--out", plotted],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    assert plotted.stat().st_size > 10_000


@pytest.mark.full
def test_a_data_set_folder_stands_for_a_hub_name(text, tmp_path):
    """``load_dataset`` takes a local folder as it takes a hub data set."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [json.dumps({"body": line}) for line in (text / "one.txt").read_text().split("\n")]
    (folder / "train.jsonl").write_text("\n".join(rows))
    more = ["--out", tmp_path / "out", "--adapter-rank", "0", "--sparsity", "1:4"]
    run(*TINY, "--dataset", folder, "--text-column", "body", *more, "--dtype", "bfloat16")
    wrong = run(*TINY, "--dataset", folder, "--out", tmp_path / "no", fails=True)
    assert "has the columns body" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text-files", "/nowhere/*.txt"], "no such file"),
        (["--resume"], "no checkpoint"),
        (["--text-files", "README.md", "--dataset", "x"], "exclude each other"),
    ],
)
def test_mistakes(arguments, words, tmp_path, monkeypatch):
    """In this process, to spare one's start: what would be printed is what is raised."""
    mistaken([*arguments, "--out", tmp_path / "out"], words, monkeypatch)


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_folder_of_something_else_is_left_alone(more, tmp_path, monkeypatch):
    """Runs of other programs in it, whose checkpoints have names that are alike."""
    (tmp_path / "checkpoint-000100").mkdir()
    (tmp_path / "thesis.tex").write_text("all of it")
    if not more:
        (tmp_path / "checkpoint-000100").rmdir()
    before = sorted(tmp_path.rglob("*"))
    mistaken(["--out", tmp_path, *more], "holds other files than those of a run", monkeypatch)
    assert sorted(tmp_path.rglob("*")) == before


def test_overwriting_deletes_the_files_of_the_run_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from checkpoints import delete_run

    for folder in ("checkpoint-000100", "partial-checkpoint-000200", "checkpoint-4", "gpt2"):
        (tmp_path / folder).mkdir()
    for file in ("arguments.json", "log.json", "loss.png", "sample.txt", "notes.txt"):
        (tmp_path / file).write_text("")
    delete_run(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-4", "gpt2", "notes.txt"}


def mistaken(arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import pretrain_gpt2

    told = [*TINY, *arguments]
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt2.py", *map(str, told)])
    with pytest.raises(SystemExit, match=words):
        pretrain_gpt2.main()
