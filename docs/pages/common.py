"""What all pages share: results files, tables, and how a figure is written."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"

Result = dict[str, Any]


def read(name: str) -> Result:
    """A results file."""
    result: Result = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def read_if_there(name: str) -> Result | None:
    """A results file that needs a GPU or a quiet machine to make, or None."""
    return read(name) if (RESULTS / f"{name}.json").exists() else None


def table(rows: Iterable[Iterable[Any]], headers: Iterable[str]) -> str:
    return tabulate(list(rows), list(headers), "github", disable_numparse=True)


def pivot(
    entries: Iterable[Result],
    row: Callable[[Result], Any],
    column: Callable[[Result], Any],
    cell: Callable[[Result], str],
) -> tuple[list[Any], dict[Any, list[str]]]:
    """Entries as a table: the columns, and for each row its cells, "" where there is no entry."""
    found: dict[Any, dict[Any, str]] = {}
    columns: dict[Any, None] = {}
    for entry in entries:
        columns[column(entry)] = None
        found.setdefault(row(entry), {})[column(entry)] = cell(entry)
    return list(columns), {
        key: [cells.get(name, "") for name in columns] for key, cells in found.items()
    }


def section(title: str, *paragraphs: str) -> str:
    """A section of a page, with an empty line between its parts."""
    return "\n\n".join([f"## {title}", *(p.strip("\n") for p in paragraphs if p)])


def page(*parts: str) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def filled(text: str, blocks: dict[str, str]) -> str:
    """A page with what is between ``<!-- name -->`` and ``<!-- /name -->`` replaced."""
    for name, block in blocks.items():
        marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = marked.subn(lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text)
        assert count == 1, f"the page has {count} blocks <!-- {name} -->"
    return text


def taken(result: Result) -> str:
    """Where and when a result was taken."""
    count = result["threads"]
    threads = "1 thread" if count == 1 else f"{count} threads"
    return (
        f"{result['device']}, {threads}, torch {result['versions']['torch']}, "
        f"{result['date']}, at {result['commit']}."
    )


def speedup(entry: Result, digits: int = 2) -> str:
    """The median and the quartiles of the paired ratios."""
    low, high = entry["speedup_quartiles"]
    return f"**{entry['speedup']:.{digits}f}** ({low:.{digits}f} to {high:.{digits}f})"


def mib(count: float) -> str:
    return f"{count / 2**20:.0f}"


def ratio(sides: Result, digits: int = 3) -> str:
    """Sparse over dense."""
    return f"{sides['sparse'] / sides['dense']:.{digits}f}" if sides["dense"] else ""
