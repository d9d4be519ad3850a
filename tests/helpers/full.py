"""All tests, the matrix of consistency and that of several ranks, with a results file.

python tests/helpers/full.py --write benchmarks/results/test_full.json
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
    options = parser.parse_args()
    report = ROOT / "build" / "test-full.xml"
    begun = time.perf_counter()
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "4", "-m", "",
         "--durations", "200", "--junitxml", str(report)],
        cwd=ROOT,
    )  # fmt: skip
    results = {**about(), **counts(report), "seconds": round(time.perf_counter() - begun)}
    codes = [tests.returncode]
    # After each part, so that a run that is stopped keeps what it has.
    write(options.write, results)
    for name, program, file in PARTS:
        part = subprocess.run([sys.executable, program, "--write", file], cwd=ROOT)
        codes.append(part.returncode)
        results[name] = {"file": file, "agrees": part.returncode == 0}
        write(options.write, results)
    sys.exit(max(codes))


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


def counts(report: Path) -> dict[str, int]:
    """The numbers of tests in a JUnit report."""
    suite = ElementTree.parse(report).getroot()[0].attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    return {"passed": int(suite["tests"]) - failed - skipped, "failed": failed, "skipped": skipped}


def write(file: Path, results: dict[str, Any]) -> None:
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
