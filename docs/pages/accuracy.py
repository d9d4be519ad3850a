"""The tables of docs/accuracy.md."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence

from .common import DOCS, RESULTS, Result, filled, table

LINES = RESULTS / "accuracy.jsonl"
REFERENCE, DENSE = "slope", "dense"
NOT_RUN = "No run of this stage is committed yet."
QUANTILES = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Of Student's t, for an interval of 95%, by the degrees of freedom."""


def accuracy() -> str:
    runs = lines()
    blocks = {"compared": compared(runs), "tuned": tuned(runs)}
    return filled((DOCS / "accuracy.md").read_text(), blocks)


def lines() -> list[Result]:
    """All runs so far."""
    if not LINES.exists():
        return []
    return [json.loads(line) for line in LINES.read_text().splitlines()]


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """The mean, and the half width of its 95% interval; infinite for one number."""
    mean = statistics.fmean(numbers)
    if len(numbers) < 2:
        return mean, math.inf
    quantile = QUANTILES[min(len(numbers) - 1, len(QUANTILES) - 1)]
    return mean, quantile * statistics.stdev(numbers) / math.sqrt(len(numbers))


def by_arm(runs: Iterable[Result], rung: str) -> dict[tuple[str, float], dict[int, Result]]:
    """The runs of the stage that compares, by arm and learning rate, then by seed."""
    found: dict[tuple[str, float], dict[int, Result]] = {}
    for run in runs:
        if run["rung"] == rung and run["seed"] > 0:
            found.setdefault((run["arm"], run["lr"]), {})[run["seed"]] = run
    return found


def differences(arm: dict[int, Result], other: dict[int, Result]) -> list[float]:
    """Losses of an arm minus those of another one, of the same seeds."""
    return [arm[seed]["loss"] - other[seed]["loss"] for seed in sorted(arm.keys() & other.keys())]


def compared(runs: list[Result]) -> str:
    rungs = dict.fromkeys(run["rung"] for run in runs if run["seed"] > 0)
    parts = [_rung(rung, by_arm(runs, rung)) for rung in rungs]
    return "\n\n".join(part for part in parts if part) or NOT_RUN


def _rung(rung: str, arms: dict[tuple[str, float], dict[int, Result]]) -> str:
    reference, dense = (
        max((arm for (name, _), arm in arms.items() if name == end), key=len, default={})
        for end in (REFERENCE, DENSE)
    )
    rows = []
    for (name, rate), arm in sorted(arms.items(), key=lambda pair: _mean_loss(pair[1])):
        less = differences(arm, reference)
        gaps = [
            (reference[s]["loss"] - arm[s]["loss"]) / (reference[s]["loss"] - dense[s]["loss"])
            for s in sorted(arm.keys() & reference.keys() & dense.keys())
        ]
        some = next(iter(arm.values()))
        rows.append((
            name, f"{rate:g}", len(arm), f"{_mean_loss(arm):.4f}",
            _said(less) if arm is not reference else "", _said(gaps, 2) if gaps else "",
            f"{some['cost']:.3f}", _time(arm, dense),
        ))  # fmt: skip
    headers = (
        "arm", "learning rate", "seeds", "loss", f"minus {REFERENCE}", "of the gap closed",
        "cost", "time",
    )  # fmt: skip
    return (
        f"The {rung} rung, {next(iter(next(iter(arms.values())).values()))['tokens']:,} bytes of "
        "text. The loss is in nats a byte on text that was held out, the mean over the seeds; "
        "differences are paired by seed, with 95% intervals. The cost is that of the products in "
        "FLOPs, and the time that of all steps, both relative to dense on the same processor."
        f"\n\n{table(rows, headers)}"
    )


def _time(arm: dict[int, Result], dense: dict[int, Result]) -> str:
    """The median over the seeds; the runs of a seed count if they had the same processor."""
    ratios = [
        arm[seed]["seconds"] / dense[seed]["seconds"]
        for seed in arm.keys() & dense.keys()
        if arm[seed]["device"] == dense[seed]["device"]
    ]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def _mean_loss(arm: dict[int, Result]) -> float:
    return statistics.fmean(run["loss"] for run in arm.values())


def _said(numbers: Sequence[float], digits: int = 4) -> str:
    if not numbers:
        return ""
    mean, half = interval(numbers)
    return f"{mean:+.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def tuned(runs: list[Result]) -> str:
    found: dict[tuple[str, str], dict[float, float]] = {}
    for run in runs:
        if run["seed"] == 0:
            found.setdefault((run["rung"], run["arm"]), {})[run["lr"]] = run["loss"]
    if not found:
        return NOT_RUN
    rates = sorted({rate for losses in found.values() for rate in losses})
    rows = []
    for (rung, arm), losses in found.items():
        best = min(losses.values())
        cells = [
            "" if rate not in losses
            else f"**{losses[rate]:.4f}**" if losses[rate] == best
            else f"{losses[rate]:.4f}"
            for rate in rates
        ]  # fmt: skip
        rows.append((rung, arm, *cells))
    headers = ("rung", "arm", *(f"{rate:g}" for rate in rates))
    return (
        "Held-out loss with one seed, by the learning rate. The best is in bold.\n\n"
        f"{table(rows, headers)}"
    )
