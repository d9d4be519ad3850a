"""The documentation: its snippets run as written, its links lead somewhere, its figures are the
results'."""

import ast
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
from slope_fx import cli, errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = (
    "make ", "source ", "pip ", "python examples/", "torchrun ", "sbatch ", "TORCH_",
)  # fmt: skip
"""Commands that set up, or take an hour: CI itself makes the environment, and the examples have
tests of their own."""
LONG = ("index", "inference", "methods", "quickstart", "recipes", "scaling")
SOURCES = ("slope_fx", "passes", "ops", "kernels")


@pytest.fixture(scope="module")
def generate():
    """The script that writes the generated pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        import generate

        yield generate


def with_code():
    """The pages; those that take long, in ``make test-full`` alone."""
    found = [page for page in PAGES if re.search(r"^```(python|console)", page.read_text(), re.M)]
    return [
        pytest.param(page, marks=[pytest.mark.full] * (page.stem in LONG), id=page.stem)
        for page in found
    ]


def run_command(line, name):
    """A line of a console block, in this process."""
    program, *arguments = shlex.split(line)
    if program == "slope-fx":
        assert cli.main(arguments) == 0, line
    elif program == "python":
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        raise AssertionError(f"{name}: nobody runs `{line}`")


@pytest.mark.parametrize("page", with_code())
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


def test_the_troubleshooting_page_has_a_heading_for_each_class():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    public = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    headings = set(re.findall(r"^### `(\w+)`$", text, re.MULTILINE))
    assert headings == public - {"SlopeError", "SlopeWarning"}


def test_the_troubleshooting_page_quotes_the_messages():
    """Each quoted part of a message, between ``...``, is in a string of the sources."""
    strings = []
    for file in (path for room in SOURCES for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            constants = (part.value for part in parts if isinstance(part, ast.Constant))
            strings.append("".join(value for value in constants if isinstance(value, str)))
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    ours = text[: text.index("## Without an error of slope_fx")]
    messages = re.findall(r"^\| (?!message|-)(.*?) \|", ours, re.MULTILINE)
    quoted = [q for m in messages for q in re.findall(r"``\s(.+?)\s``|`([^`]+)`", m)]
    parts = {part.strip() for pair in quoted for part in "".join(pair).split("...")} - {""}
    assert len(parts) > 30
    assert not [part for part in parts if not any(part in string for string in strings)]


def test_every_environment_variable_is_in_its_page():
    """Those that the sources read; each that the page has, some source or torch reads."""
    named = re.compile(r"""(?:environ(?:\.get)?|getenv)[(\[]\s*["'](\w+)["']""")
    files = [p for room in SOURCES for s in ("py", "c", "h") for p in (ROOT / room).rglob(f"*.{s}")]
    read = {name for file in files for name in named.findall(file.read_text())}
    assert {"SLOPE_FX_ENGINES", "CC"} <= read
    page = (ROOT / "docs" / "environment.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == read | {
        "TORCH_LOGS",
        "TORCH_TRACE",
    }


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[\w-]+)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


PAGES_MADE = (
    "readme",
    "index",
    "results",
    "gpu",
    "paper",
    "passes",
    "consistency",
    "checkpoints",
    "pretrained",
    "inference",
    "scaling",
    "accuracy",
)


@pytest.mark.parametrize("name", PAGES_MADE)
def test_generated_parts_are_up_to_date(generate, name):
    """`make readme` would change nothing."""
    assert tuple(generate.PAGES) == PAGES_MADE
    page = generate.PAGES[name]
    text = page.text()
    assert (text is None) == (not page.path.exists())
    assert text is None or text == page.path.read_text()


def test_an_unknown_page_is_told(generate, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", "paper", "nowhere"])
    with pytest.raises(SystemExit):
        generate.main()
    assert "no page nowhere; there are readme, index" in capsys.readouterr().err


def test_the_api_page_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    internal = {"__version__", "FORMAT_VERSION", "Manifest", "read_manifest"}
    for name in {*slope_fx.__all__, *slope_fx.checkpoints.__all__} - internal:
        assert re.search(rf"^::: (?:slope_fx\.)?[\w.]*\b{name}\b", text, re.MULTILINE), name


def test_every_page_is_in_the_navigation():
    listed = set(
        re.findall(r"^ +- (?:\w+: )?([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    )
    assert listed == {page.name for page in PAGES}


def test_each_mutant_changes_one_place():
    """`make mutants` takes its time; that its texts are still in the sources is told here."""
    import mutants

    for mutant in mutants.MUTANTS:
        text = (ROOT / mutant.file).read_text()
        assert text.count(mutant.before) == 1, (mutant.file, mutant.before)
    for path in (*mutants.SLICE, *mutants.FURTHER):
        assert (ROOT / path).is_file(), path
