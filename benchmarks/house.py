"""How large the package is and how its rooms hang together, of two checkouts side by side.

    python benchmarks/house.py --before ../older-checkout

Counts what can be counted of ``slope_fx passes ops kernels``: files, lines, lines of code, public
names, the longest function, the widest function, imports between rooms and those that point
backwards, and the places where formatter or type checker were overruled.
"""

import ast
import os
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("slope_fx", "passes", "ops", "kernels")
FLOW = ("slope_fx", "passes", "ops", "kernels")
"""The rooms of the top level, each importing from those after it alone."""


def sources(root: Path) -> list[Path]:
    """The Python files of the package, each once: the checkout links rooms into slope_fx/."""
    links = {path for path in (root / "slope_fx").iterdir() if path.is_symlink()}
    found = [p for name in FOLDERS for p in sorted((root / name).rglob("*.py"))]
    return [p for p in found if not any(link in p.parents for link in links)]


def code_lines(path: Path) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    tree = ast.parse(path.read_text())
    docs: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(getattr(value, "value", 0), str):
                docs.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    with path.open("rb") as file:
        lines = {
            line
            for token in tokenize.tokenize(file.readline)
            if token.type not in (*skipped, tokenize.ENCODING, tokenize.ENDMARKER)
            for line in range(token.start[0], token.end[0] + 1)
        }
    return len(lines - docs)


def functions(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Each function with its lines, docstring aside, and its parameters."""
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                if any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list):
                    continue  # a kernel's arguments are those of a launch
                first = node.body[0]
                if ast.get_docstring(node) is not None and len(node.body) > 1:
                    first = node.body[1]
                elif ast.get_docstring(node) is not None:
                    continue
                length = (node.end_lineno or 0) - first.lineno + 1
                arguments = node.args
                count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
                found.append((f"{path.stem}.{node.name}", length, count))
    return found


def room_of(module: str) -> str:
    """The room of a module's name below slope_fx: one of the top level, or a folder in it."""
    parts = module.split(".")
    if len(parts) == 1:
        return "slope_fx"
    return parts[1] if parts[1] in FLOW else f"slope_fx/{parts[1]}"


def imports(root: Path, paths: list[Path]) -> Counter[tuple[str, str]]:
    """How often a room imports from another."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in paths:
        name = path.relative_to(root).with_suffix("").parts
        module = ".".join(name if name[0] == "slope_fx" else ("slope_fx", *name))
        here = "slope_fx" if len(name) == 2 and name[0] == "slope_fx" else room_of(module)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
                continue
            if node.module.split(".")[0] != "slope_fx":
                continue
            targets = [node.module]
            if node.module == "slope_fx":
                targets = [f"slope_fx.{alias.name}" for alias in node.names]
            for target in targets:
                there = room_of(target)
                folder = root / there
                if there.startswith("slope_fx/") and not folder.is_dir():
                    there = "slope_fx"
                if there != here:
                    counts[here, there] += 1
    return counts


def backward(counts: Counter[tuple[str, str]]) -> list[str]:
    """Imports against the flow of the top level, and pairs of rooms that import each other."""

    def level(room: str) -> int:
        return FLOW.index(room.split("/")[0])

    against = [f"{a} -> {b}" for a, b in counts if level(a) > level(b)]
    mutual = [f"{a} <-> {b}" for a, b in counts if a < b and (b, a) in counts]
    # slope_fx itself holds the front door, which imports all, and what all rooms share.
    return sorted(against + [pair for pair in mutual if "slope_fx <->" not in pair])


def public_names(root: Path) -> int:
    """What ``dir(slope_fx)`` shows, underscores aside."""
    code = "import slope_fx; print(sum(not n.startswith('_') for n in dir(slope_fx)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": "."},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


def measured(root: Path) -> dict[str, Any]:
    paths = sources(root)
    text = "\n".join(path.read_text() for path in paths)
    every = functions(paths)
    longest, widest = max(every, key=lambda f: f[1]), max(every, key=lambda f: f[2])
    counts = imports(root, paths)
    native = [p for suffix in ("*.c", "*.h") for p in (root / "kernels").rglob(suffix)]
    commit = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "commit": subprocess.run(
            commit, cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip(),
        "files": len(paths),
        "lines": text.count("\n"),
        "code_lines": sum(map(code_lines, paths)),
        "native_lines": sum(p.read_text().count("\n") for p in native),
        "files_in_slope_fx_itself": len(list((root / "slope_fx").glob("*.py"))),
        "longest_file": max((p.read_text().count("\n"), p.name) for p in paths),
        "public_names": public_names(root),
        "longest_function": longest[:2],
        "widest_function": (widest[0], widest[2]),
        "imports_between_rooms": sum(counts.values()),
        "imports_backwards": backward(counts),
        "fmt_skip": text.count("# fmt: skip"),
        "assert_not_none": sum(
            isinstance(node, ast.Assert)
            and isinstance(node.test, ast.Compare)
            and isinstance(node.test.ops[0], ast.IsNot)
            for path in paths
            for node in ast.walk(ast.parse(path.read_text()))
        ),
        "longest_test_file": max(
            (p.read_text().count("\n"), p.name) for p in (root / "tests").rglob("test_*.py")
        ),
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="an older checkout")
    args = parser.parse_args()
    before, after = measured(args.before.resolve()), measured(ROOT)
    for name in after:
        print(f"{name:26} {before[name]!s:34} {after[name]!s}")
    args.before = before["commit"]
    common.write("house", args, before=before, after=after)


if __name__ == "__main__":
    main()
