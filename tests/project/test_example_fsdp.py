"""The example of many ranks, as its page says to run it: torchrun, SLURM, kills and restarts."""

import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import slope_fx

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
STUBS = {
    "scontrol": "echo localhost",
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
}
"""What a machine without SLURM has in its place."""


@pytest.fixture(scope="module")
def kill_ranks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import kill_ranks

        yield kill_ranks


def environment(**more):
    """With this Python's torchrun, one thread a rank, and no hub."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def whole(out, steps):
    """Whether all steps are in the log, and steps that were taken again gave the same loss."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seen = {line["step"]: line for line in lines}
    assert all(line == seen[line["step"]] for line in lines)
    assert sorted(seen) == list(range(1, steps + 1))
    return lines


@pytest.mark.full
def test_the_job_script_survives_a_kill(kill_ranks, tmp_path):
    """As if SLURM had started it on one node with two GPUs; a rank is killed after a checkpoint."""
    (script,) = re.findall(r"^```bash pretrain.sbatch\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    (tmp_path / "pretrain.sbatch").write_text(script.replace("29500", str(port)))
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    slurm = environment(
        SLURM_NNODES="1", SLURM_GPUS_ON_NODE="2", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="here"
    )
    slurm["PATH"] = f"{tmp_path}{os.pathsep}{slurm['PATH']}"
    out = tmp_path / "out"
    arguments = [*kill_ranks.TINY, *kill_ranks.write_text(tmp_path), "--steps", "8"]
    command = ["bash", str(tmp_path / "pretrain.sbatch"), *arguments, "--out", str(out)]
    with kill_ranks.Job(out, command, slurm) as job:
        job.wait_for(lambda: kill_ranks.newest(out))
        os.kill(job.ranks(0)[1], signal.SIGKILL)
        job.end()
    assert "goes on from" in job.messages.read_text()
    assert {line["phase"] for line in whole(out, 8)} == {"sparse", "adapter"}
    assert (out / "sample.txt").read_text().startswith("the quick")
    weights = slope_fx.sparse_weights(slope_fx.load_pretrained(out / "model", backend=None))
    assert all(weight.lora_B.any() for weight in weights.values())


@pytest.mark.full
@pytest.mark.parametrize("index", [0, 1])
def test_the_commands_of_the_page(kill_ranks, tmp_path, index):
    """Through Inductor, which TINY replaces."""
    lines = re.findall(r"^(?:TORCH_\S+ )?torchrun .*$", PAGE, re.MULTILINE)
    variables, _, command = lines[index].rpartition("torchrun ")
    more = dict(pair.split("=") for pair in variables.split())
    arguments = [*kill_ranks.TINY, *kill_ranks.write_text(tmp_path), "--steps", "4"]
    arguments += ["--backend", "inductor", "--out", str(tmp_path / "out")]
    subprocess.run(
        ["torchrun", *shlex.split(command), *arguments],
        cwd=ROOT, env=environment(**more), check=True, capture_output=True,
    )  # fmt: skip
    whole(tmp_path / "out", 4)


def test_the_text_is_prepared_without_ranks(monkeypatch, tmp_path):
    """The rows are those that a tokenizer makes of the whole text, cut into contexts."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import pretrain_fsdp
    import text_data
    from transformers import PreTrainedTokenizerFast

    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("".join(f"line {i} of a text, and {i * i} more\n" for i in range(3000)))
    options = ["--text-files", str(text), "--context", "32", "--vocab-size", "300"]
    monkeypatch.setattr(
        sys, "argv", ["pretrain_fsdp.py", "--prepare-only", "--out", str(out), *options]
    )
    pretrain_fsdp.main()
    rows = text_data.mapped_rows(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    lines = text.read_text().splitlines(keepends=True)[: 3000 - 150]
    want = [i for line in lines for i in tokenizer(line)["input_ids"]]
    assert rows.shape == (len(want) // 32, 32)
    assert rows.flatten().tolist() == want[: rows.numel()]
    assert sorted(p.name for p in out.iterdir()) == ["rows.json", "rows.npy", "tokenizer"]
    pretrain_fsdp.main()  # once more: the rows stay
    assert text_data.mapped_rows(out).shape == rows.shape
    # A job that asks for other rows does not train on these.
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--context", "64"])
    with pytest.raises(SystemExit, match="its rows have --context 32, not 64"):
        pretrain_fsdp.main()


@pytest.mark.full
def test_ranks_that_are_killed(kill_ranks, tmp_path):
    """``measure`` compares with a run without kills, bit for bit."""
    result = kill_ranks.measure(tmp_path, steps=8, kills=2, seed=3)
    assert len(result["moments"]) == 2


@pytest.mark.full
def test_other_world_sizes(kill_ranks, tmp_path):
    result = kill_ranks.measure_worlds(tmp_path, 9, [2, 1, 3])
    assert result["worst_loss"] < 1e-5
    assert result["bytes_of_masks_differing"] == 0


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "Start this file with torchrun"),
        (
            {
                "LOCAL_RANK": "0",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_MAX_RESTARTS": "3",
            },
            "--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ),
    ],
)
def test_mistakes(variables, words, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import pretrain_fsdp

    monkeypatch.setattr(sys, "argv", ["pretrain_fsdp.py", "--device", "cpu"])
    for name in ("LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=words):
        pretrain_fsdp.main()
