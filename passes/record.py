"""What each pass did to a graph: counts always, and its code before and after if asked for."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate
from torch.fx import GraphModule

from slope_fx.passes.graph import graphs_of


@dataclass(frozen=True)
class PassReport:
    """What one pass did to a graph and the graphs nested in it.

    Attributes:
        name: of the pass.
        matches: how many places it rewrote.
        expected: how many there were for it; 0 where that isn't known beforehand.
        nodes_before, nodes_after: of all the graphs.
    """

    name: str
    matches: int
    expected: int
    nodes_before: int
    nodes_after: int

    @property
    def missed(self) -> bool:
        """Whether it matched nothing, where there was something."""
        return self.expected > 0 and self.matches == 0


class Recorder:
    """Writes the graph after each pass into a folder, numbered, with a diff against the one before.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._code: list[str] = []
        self._number = 0

    def start(self, gm: GraphModule) -> None:
        """Write the graph as it came."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._code = readable(gm)
        self._write("00_traced.py", self._code)

    def after(self, gm: GraphModule, report: PassReport) -> None:
        """Write the graph as a pass left it."""
        self._number += 1
        before, self._code = self._code, readable(gm)
        name = f"{self._number:02d}_{report.name}"
        self._write(f"{name}.py", self._code)
        diff = difflib.unified_diff(before, self._code, "before", name, n=2, lineterm="")
        self._write(f"{name}.diff", list(diff))

    def finish(self, reports: tuple[PassReport, ...]) -> None:
        """Write the table of counts."""
        self._write("passes.txt", table(reports).splitlines())

    def _write(self, name: str, lines: list[str]) -> None:
        (self.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def node_count(gm: GraphModule) -> int:
    """Nodes of a graph and the graphs nested in it."""
    return sum(len(graph_module.graph.nodes) for graph_module in graphs_of(gm))


def readable(gm: GraphModule) -> list[str]:
    """The code of a graph and the graphs nested in it, with shapes and dtypes, by line."""
    return str(gm.print_readable(print_output=False)).splitlines()


def table(reports: tuple[PassReport, ...]) -> str:
    """The counts as a table."""
    rows = [
        (r.name, r.matches, f"of {r.expected}" if r.expected else "", r.nodes_before, r.nodes_after,
         "matched nothing, though there was something for it" if r.missed else "")
        for r in reports
    ]  # fmt: skip
    headers = ("pass", "matches", "expected", "nodes before", "nodes after", "")
    return tabulate(rows, headers)
