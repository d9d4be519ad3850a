"""The README's code runs as written; test_docs.py compares its figures with the results."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.inductor
@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet_runs(index, tmp_path):
    strict = (
        "import slope_fx, warnings; warnings.simplefilter('error', slope_fx.errors.SlopeWarning)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", strict + SNIPPETS[index]],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_there_is_a_snippet():
    assert len(SNIPPETS) == 1


def test_it_is_short():
    assert len(README.splitlines()) < 130
    assert README.count("![") == 1


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"train", "test"} <= set(re.findall(r"(?m)(?:^|`)make ([a-z-]+)", README)) <= targets


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
