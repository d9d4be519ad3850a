"""All tests, the matrix of consistency and that of several ranks, with a results file.

    python tests/helpers/full.py --write benchmarks/results/test_full.json
    python tests/helpers/full.py --write benchmarks/results/test_full.json --again

The second command runs the tests again that failed, after a repair, and notes it in the file.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    ("matrix", "tests/helpers/consistency.py", "benchmarks/results/consistency.json"),
    ("ranks", "tests/helpers/ranks_matrix.py", "benchmarks/results/ranks.json"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True)
    parser.add_argument("--again", action="store_true", help="only what failed")
    options = parser.parse_args()
    if options.again:
        results = json.loads(options.write.read_text())
        results["again"], code = run_tests(results["failures"])
        write(options.write, results)
        sys.exit(code)
    results, code = run_tests([])
    codes = [code]
    # After each part, so that a run that is stopped keeps what it has.
    write(options.write, results)
    for name, program, file in PARTS:
        part = subprocess.run([sys.executable, program, "--write", file], cwd=ROOT)
        codes.append(part.returncode)
        results[name] = {"file": file, "agrees": part.returncode == 0}
        write(options.write, results)
    sys.exit(max(codes))


def run_tests(names: list[str]) -> tuple[dict[str, Any], int]:
    """Run the named tests, or all; returns the results and pytest's exit code."""
    report = ROOT / "build" / "test-full.xml"
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "4", "-m", "",
         "--durations", "200", "--junitxml", str(report), *names],
        cwd=ROOT,
    )  # fmt: skip
    seconds = round(time.perf_counter() - begun)
    return {**about(), **counts(report), "seconds": seconds}, done.returncode


def about() -> dict[str, Any]:
    """What was tested, and with which versions."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from common import commit

    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "triton")},
    }


def counts(report: Path) -> dict[str, Any]:
    """The numbers of tests in a JUnit report, and the names of those that failed."""
    suite = ElementTree.parse(report).getroot()[0]
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    skipped = int(suite.attrib["skipped"])
    passed = int(suite.attrib["tests"]) - failed - skipped
    failures = [
        f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}"
        for case in suite
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {"passed": passed, "failed": failed, "skipped": skipped, "failures": failures}


def write(file: Path, results: dict[str, Any]) -> None:
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
