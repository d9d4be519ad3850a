"""The documentation: its snippets run as written, its links lead somewhere, its figures are the
results'."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

import slope_fx
from slope_fx import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = ("make ", "source ", "pip ", "python examples/")
"""Commands that set up, or take an hour: CI itself makes the environment, and the example has a
test of its own."""


def with_code():
    return [page for page in PAGES if re.search(r"^```(python|console)", page.read_text(), re.M)]


def run_command(line, name):
    """A line of a console block, in this process."""
    program, *arguments = shlex.split(line)
    if program == "slope-fx":
        assert cli.main(arguments) == 0, line
    elif program == "python":
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        raise AssertionError(f"{name}: nobody runs `{line}`")


@pytest.mark.parametrize("page", with_code(), ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_snippets_run_as_written(page, tmp_path, monkeypatch):
    """In order, in one folder and one namespace; what follows as ```text is what was printed.

    Not through Inductor, to which the README's snippets go.
    """
    monkeypatch.chdir(tmp_path)
    for function in (slope_fx.compile, slope_fx.load_pretrained):
        monkeypatch.setitem(function.__kwdefaults__, "backend", "eager")
    monkeypatch.setattr(sys, "argv", ["docs"])
    names, printed = {"__name__": "docs"}, ""
    for kind, file, code in BLOCK.findall(page.read_text()):
        if kind == "text":
            assert printed.startswith(code)
        elif file:
            Path(file).write_text(code)
        elif kind == "python":
            torch._dynamo.reset()
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(code, f"{page.name}", "exec"), names)
            printed = output.getvalue()
        elif kind == "console":
            for line in code.splitlines():
                if not line.startswith(ELSEWHERE):
                    run_command(line, page.name)


def test_every_error_is_in_the_troubleshooting_page():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    names = [n for n in slope_fx.__all__ if n.endswith(("Error", "Warning"))]
    assert not [name for name in names if f"`{name}" not in text and f".{name}`" not in text]


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[\w-]+)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_generated_parts_are_up_to_date(monkeypatch):
    """`make readme` would change nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make_api
    import make_training

    assert make_api.page() == make_api.PAGE.read_text()
    for page in make_training.BLOCKS:
        assert make_training.filled(page) == (ROOT / "docs" / page).read_text()


def test_the_api_page_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    modules = {"averaging", "debug", "ops", "__version__"}
    for name in set(slope_fx.__all__) - modules:
        assert f"`slope_fx.{name}`" in text or f"- `{name}`" in text, name
