"""The GPU benchmark and its page, run whole on the smallest sizes in Triton's interpreter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
JUNIT = '<testsuites><testsuite tests="9" failures="{}" errors="0" skipped="2"/></testsuites>'


@pytest.fixture
def pages(monkeypatch):
    """The module that makes the page."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from pages import gpu

    return gpu


def benchmark(*arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.full
def test_it_runs_and_its_page_is_made(tmp_path, pages):
    junit = tmp_path / "tests.xml"
    junit.write_text(JUNIT.format(1))
    done = benchmark(
        "--device", "cpu", "--out", tmp_path, "--tests", junit, TRITON_INTERPRET="1"
    )  # fmt: skip
    assert "some failed" in done.stderr  # after the results are written
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["tests"] == {"tests": 9, "failures": 1, "errors": 0, "skipped": 2}
    counts = {"kernels": 4, "decoding": 4, "blocks": 1, "products": 3}
    assert {part: len(result[part]) for part in counts} == counts
    (block,) = result["blocks"]
    assert {r["engine"] for linear in block["explain"]["linears"] for r in linear["products"]} == {
        "triton"
    }
    state = block["state_bytes"]
    assert 0.5 < state["sparse"] / state["dense"] < 1
    page = pages.gpu_page(result)
    assert "Of 9 tests 6 passed, 2 were skipped." in page
    for kernel in result["kernels"]:
        assert kernel["kernel"] in page
    assert len(re.findall(r"\*\*\d+\.\d\d\*\*", page)) == 4 + 2 * 3 + 3


@pytest.fixture
def in_process(monkeypatch):
    """Runs the benchmark in this process, to spare one's start."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("SLOPE_FX_ENGINES", "triton")  # which it sets itself, and this restores
    import gpu

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
        gpu.main()

    return run


def test_what_time_does_not_allow_is_told(tmp_path, pages, in_process):
    in_process("--device", "cpu", "--out", tmp_path, "--seconds", 0)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert len(result["left_out"]) == 4 + 1 + 1 + 1
    assert "Left out for lack of time: decoding 16 to 32, 1 tokens;" in pages.gpu_page(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path, in_process, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SystemExit, match="there is no CUDA device"):
        in_process("--out", tmp_path)
    with pytest.raises(SystemExit, match="--device cpu needs TRITON_INTERPRET=1"):
        in_process("--device", "cpu", "--out", tmp_path)
