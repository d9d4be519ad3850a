"""The README's code runs as written, and its generated parts are the committed results'."""

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


def test_there_are_snippets():
    assert len(SNIPPETS) == 2


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"train", "test"} <= set(re.findall(r"(?m)(?:^|`)make ([a-z-]+)", README)) <= targets


def test_generated_parts_are_those_of_the_committed_results(tmp_path):
    """`make readme` would change nothing."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import make_passes
        import make_readme
        import make_results
    finally:
        sys.path.remove(str(ROOT / "docs"))
    sparse, dense = (make_readme.read(f"train_{kind}.json") for kind in ("sparse", "dense"))
    names = ("training_step", "decoding", "memory")
    benchmarks = [make_readme.read(f"{name}.json") for name in names]
    assert make_readme.explain_block(benchmarks[0]) in README
    assert make_readme.figures_block(sparse, dense, *benchmarks) in README
    assert make_results.page() == make_results.PAGE.read_text()
    assert make_passes.page() == make_passes.PAGE.read_text()


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
