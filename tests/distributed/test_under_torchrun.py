"""Trainers under torchrun itself, with ``slope_fx.compile`` in its default settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launched import plain_loop
from parallel import assert_same

SCRIPT = Path(__file__).parents[1] / "helpers" / "under_torchrun.py"
_plain = []


@pytest.mark.full
@pytest.mark.inductor
@pytest.mark.parametrize("kind", ["trainer", "accelerate", "lightning"])
def test_two_processes_end_as_a_loop_in_one(kind, tmp_path):
    """Both phases and two refreshes; the loop doesn't go through Inductor."""
    if not _plain:
        _plain.append(plain_loop("llama"))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(SCRIPT), kind, str(tmp_path / "state.pt")],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ExpandedWeightWarning" not in done.stderr
    state = torch.load(tmp_path / "state.pt")
    assert_same({"losses": [0.0], "state": state}, {**_plain[0], "losses": [0.0]})
