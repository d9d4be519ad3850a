"""The pictures of the documentation."""

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .accuracy import by_arm, interval, lines
from .common import DOCS, ROOT, Result, read, read_if_there
from .measured import PRODUCTS

sys.path.insert(0, str(ROOT / "examples"))
from plot_run import plot as plot_run

GAP = 0.27


@contextmanager
def drawn(path: Path, **shape: Any) -> Iterator[Any]:
    """A figure that is written when the block ends."""
    figure, axes = plt.subplots(layout="constrained", **shape)
    yield axes
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def bars(axis: Any, series: dict[str, list[float]], ticks: Iterable[str], **style: Any) -> None:
    """Groups of bars side by side, with a line at the speed of dense."""
    ticks = list(ticks)
    for i, (label, heights) in enumerate(series.items()):
        offset = (i - (len(series) - 1) / 2) * GAP
        axis.bar([x + offset for x in range(len(ticks))], heights, 0.25, label=label)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(ticks)), ticks, **style)


def accuracy() -> None:
    """Held-out loss against cost, an axis for each rung that was compared."""
    runs = lines()
    rungs = list(dict.fromkeys(run["rung"] for run in runs if run["seed"] > 0))
    if not rungs:
        return
    shape = {"ncols": len(rungs), "figsize": (5.5 * len(rungs), 4.5), "squeeze": False}
    with drawn(DOCS / "accuracy.png", **shape) as axes:
        for axis, rung in zip(axes[0], rungs, strict=True):
            for (name, _), arm in by_arm(runs, rung).items():
                mean, half = interval([run["loss"] for run in arm.values()])
                cost = next(iter(arm.values()))["cost"]
                error = half if math.isfinite(half) else None
                axis.errorbar(cost, mean, yerr=error, marker="o", capsize=2)
                axis.annotate(name, (cost, mean), fontsize=6, xytext=(3, 3),
                              textcoords="offset points")  # fmt: skip
            axis.set_xlabel("cost of the products, of dense")
            axis.set_title(f"{rung} rung")
        axes[0][0].set_ylabel("held-out loss, nats a byte")


def loss() -> None:
    runs = (read("train_sparse"), read("train_dense"))
    plot_run({run["name"]: run for run in runs}, DOCS / "loss.png")


def products() -> None:
    result = read("products")
    groups = sorted({(e["dtype"], e["pattern"]) for e in result["products"]}, reverse=True)
    shape = {"ncols": len(groups), "figsize": (3.4 * len(groups), 3.2), "sharey": True}
    with drawn(DOCS / "products.png", **shape) as axes:
        for axis, (dtype, pattern) in zip(axes, groups, strict=True):
            chosen = [
                e for e in result["products"] if (e["dtype"], e["pattern"]) == (dtype, pattern)
            ]
            sizes = dict.fromkeys(f"{e['d_in']}\nto {e['d_out']}" for e in chosen)
            series = {p: [e["speedup"] for e in chosen if e["product"] == p] for p in PRODUCTS}
            bars(axis, series, sizes, fontsize=7)
            axis.set_title(f"{dtype}, {pattern}", fontsize=10)
        axes[0].set_ylabel("times faster than dense")
        axes[-1].legend(fontsize=7)


def training_step() -> None:
    stacks = {
        f"{name}\n{dtype}": made_of
        for dtype, run in read("training_step")["runs"].items()
        for name, made_of in run["breakdown"].items()
    }
    below = [0.0] * len(stacks)
    with drawn(DOCS / "training_step.png", figsize=(7, 3.2)) as axis:
        for part in next(iter(stacks.values())):
            heights = [made_of[part] for made_of in stacks.values()]
            axis.bar(range(len(stacks)), heights, 0.6, bottom=below, label=part)
            below = [a + b for a, b in zip(below, heights, strict=True)]
        axis.set_xticks(range(len(stacks)), stacks, fontsize=8)
        axis.set_ylabel("seconds a step")
        axis.legend(fontsize=7)


def paper() -> None:
    paper_plot(read("paper_dry_run"), read_if_there("paper"), DOCS / "paper.png")


def paper_plot(dry: Result, result: Result | None, path: Path) -> None:
    """Bars for each model: measured, if it was, the roofline's limit, the paper's."""
    names = [e["model"] for e in dry["models"]]
    with drawn(path, nrows=2, figsize=(8, 5), sharex=True) as axes:
        for axis, kind in zip(axes, ("training", "inference"), strict=True):
            series = {
                "at most (roofline)": [_first(e[kind]) for e in dry["models"]],
                "paper (A100)": [_first(dry["paper"][name][kind]) for name in names],
            }
            if result is not None:
                found = {
                    e["model"]: e["speedup"] for e in result["entries"]
                    if e["kind"] == kind and not e["rank"]
                }  # fmt: skip
                series["measured"] = [found.get(name, 0) for name in names]
            bars(axis, series, names, rotation=20)
            axis.set_ylabel(f"{kind},\ntimes faster")
        axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8)


def _first(value: Any) -> float:
    return value[0] if isinstance(value, list) else value
