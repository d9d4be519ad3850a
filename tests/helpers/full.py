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

ROOT = Path(__file__).resolve().parents[2]
MATRIX = "benchmarks/results/consistency.json"
ON_RANKS = "benchmarks/results/ranks.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True)
    options = parser.parse_args()
    report = ROOT / "build" / "test-full.xml"
    begun = time.perf_counter()
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "4", "-m", "",
         "--junitxml", str(report)],
        cwd=ROOT,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    matrix = subprocess.run(
        [sys.executable, "tests/helpers/consistency.py", "--write", MATRIX], cwd=ROOT
    )
    on_ranks = subprocess.run(
        [sys.executable, "tests/helpers/ranks_matrix.py", "--write", ON_RANKS], cwd=ROOT
    )
    suite = ElementTree.parse(report).getroot()[0].attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    results = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "triton")},
        "passed": int(suite["tests"]) - failed - int(suite["skipped"]),
        "failed": failed,
        "skipped": int(suite["skipped"]),
        "seconds": round(seconds),
        "matrix": MATRIX,
        "matrix_agrees": matrix.returncode == 0,
        "ranks": ON_RANKS,
        "ranks_agree": on_ranks.returncode == 0,
    }
    options.write.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))
    sys.exit(tests.returncode or matrix.returncode or on_ranks.returncode)


if __name__ == "__main__":
    main()
