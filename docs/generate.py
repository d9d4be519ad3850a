"""Write the parts of the documentation that are made from results files.

    python docs/generate.py               # all pages and pictures
    python docs/generate.py paper passes  # some, by name

The results come from ``make bench`` and ``make gpu``, and from ``make train`` and ``make
train-dense``: ``--runs DIR`` first takes the logs of these two from a folder of runs into
``benchmarks/results``.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pages import accuracy, compiling, consistency, gpu, inference, measured, scaling
from pages.common import DOCS, RESULTS, ROOT

RUNS = {"gpt2": "train_sparse", "gpt2-dense": "train_dense"}


@dataclass(frozen=True)
class Page:
    """A page, and its pictures.

    Attributes:
        path: of the file.
        text: what the file has to be; None if there are no results for it.
        plots: the names of its pictures' functions in ``pages.plots``.
    """

    path: Path
    text: Callable[[], str | None]
    plots: tuple[str, ...] = ()


PAGES = {
    "readme": Page(ROOT / "README.md", measured.readme),
    "index": Page(DOCS / "index.md", measured.index),
    "results": Page(
        DOCS / "results.md", measured.results, ("products", "training_step", "loss")
    ),
    "gpu": Page(DOCS / "gpu.md", gpu.gpu),
    "paper": Page(DOCS / "paper.md", gpu.paper, ("paper",)),
    "passes": Page(DOCS / "passes.md", compiling.passes),
    "consistency": Page(DOCS / "consistency.md", consistency.consistency),
    "checkpoints": Page(DOCS / "checkpoints.md", compiling.checkpoints),
    "pretrained": Page(DOCS / "pretrained.md", compiling.pretrained),
    "inference": Page(DOCS / "inference.md", inference.inference),
    "scaling": Page(DOCS / "scaling.md", scaling.scaling),
    "accuracy": Page(DOCS / "accuracy.md", accuracy.accuracy, ("accuracy",)),
}  # fmt: skip


def write(page: Page) -> None:
    text = page.text()
    if text is None:
        print(f"No results for {page.path.relative_to(ROOT)}.")
        return
    page.path.write_text(text)
    if page.plots:
        from pages import plots

        for name in page.plots:
            getattr(plots, name)()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", metavar="page", help=f"of {', '.join(PAGES)}")
    parser.add_argument("--runs", type=Path, help="folder of the runs to take logs from")
    args = parser.parse_args()
    unknown = set(args.pages) - set(PAGES)
    if unknown:
        parser.error(f"no page {', '.join(sorted(unknown))}; there are {', '.join(PAGES)}")
    if args.runs:
        for run, name in RUNS.items():
            log = json.loads((args.runs / run / "log.json").read_text())
            (RESULTS / f"{name}.json").write_text(json.dumps(log, separators=(",", ":")) + "\n")
    for name in args.pages or PAGES:
        write(PAGES[name])


if __name__ == "__main__":
    main()
