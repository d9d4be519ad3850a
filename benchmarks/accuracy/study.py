"""Run the accuracy study. PROTOCOL.md says what is run and why.

A run is one process on one thread, and adds one JSON line to ``results/accuracy.jsonl``. A stage
runs what is not there yet, so it goes on after any kill; a run that was cut short begins again.
An arm that has the first steps of another one, its trunk, begins where they part, if the trunk left
its state in ``build/accuracy/forks``.

    python benchmarks/accuracy/study.py quick               # three arms in under ten minutes
    python benchmarks/accuracy/study.py tune --workers 2    # hours
    python benchmarks/accuracy/study.py compare --workers 2
    python benchmarks/accuracy/study.py run --arm slope --rung small --lr 8e-3 --seed 0
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, RUNGS, trunk_of
from data import rows
from filelock import FileLock
from tqdm import tqdm
from training import CACHE, run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import RESULTS

LINES = RESULTS / "accuracy.jsonl"
RATES = (4e-3, 8e-3, 16e-3)
"""Where the grid begins; it grows by a factor of two where the best rate is at its edge."""
QUICK = {"dense": 4e-3, "slope": 8e-3, "transposable": 8e-3}
"""The arms of "quick", with rates that are near the best."""
Key = tuple[str, str, float, int]
"""An arm, a rung, a learning rate and a seed."""


def done(lines: Path) -> dict[Key, dict[str, Any]]:
    """The results so far."""
    if not lines.exists():
        return {}
    found = map(json.loads, lines.read_text().splitlines())
    return {(r["arm"], r["rung"], r["lr"], r["seed"]): r for r in found}


def planned(stage: str, results: dict[Key, dict[str, Any]]) -> Iterator[Key]:
    """The runs of a stage."""
    if stage == "quick":
        yield from ((arm, "quick", rate, 0) for arm, rate in QUICK.items())
    elif stage == "tune":
        for arm in ARMS:
            if trunk_of(arm) is None:
                yield from _tuning(arm, results)
    else:
        best = best_rates(results)
        rungs, seeds, arms = ("small", "medium"), (1, 2, 3), list(ARMS)
        if stage == "large":
            rungs, seeds, arms = ("large",), (1, 2), ["dense", "slope", *_leaders(results)]
        arms.sort(key=lambda arm: trunk_of(arm) is not None)  # after their trunks
        for rung in rungs:
            for seed in seeds:
                yield from ((arm, rung, best[arm], seed) for arm in arms)


def _tuning(arm: str, results: dict[Key, dict[str, Any]]) -> Iterator[Key]:
    """The runs that choose the rate of an arm: those that were made, and the next ones."""
    grid: tuple[float, ...] = RATES
    if ARMS[arm].tuned_from == "quick":
        yield from ((arm, "quick", rate, 0) for rate in RATES)
        losses = _losses(arm, "quick", results)
        if not set(RATES) <= losses.keys():
            return
        further = _further(losses)
        yield from ((arm, "quick", rate, 0) for rate in further)
        if further:
            return
        best = min(losses, key=lambda rate: losses[rate])
        grid = (best, best / 2)
    yield from ((arm, "small", rate, 0) for rate in grid)
    losses = _losses(arm, "small", results)
    if set(grid) <= losses.keys() and losses[min(losses)] == min(losses.values()):
        yield arm, "small", min(losses) / 2, 0


def _losses(arm: str, rung: str, results: dict[Key, dict[str, Any]]) -> dict[float, float]:
    """The losses of an arm on a rung by learning rate, with seed 0."""
    return {
        key[2]: result["loss"]
        for key, result in results.items()
        if (key[0], key[1], key[3]) == (arm, rung, 0)
    }


def _further(losses: dict[float, float]) -> list[float]:
    """The next rate, if the best one is at the edge of the grid."""
    best = min(losses, key=lambda rate: losses[rate])
    if best == max(losses):
        return [best * 2]
    return [best / 2] if best == min(losses) else []


def best_rates(results: dict[Key, dict[str, Any]]) -> dict[str, float]:
    """The learning rate of each arm with the smallest loss on the small rung.

    An arm that has the first steps of another one has its rate too.

    Raises:
        SystemExit: the stage tune has not ended: an arm lacks rates, or its best one is at the
            edge of those that were run.
    """
    found = {}
    for arm in ARMS:
        fork = trunk_of(arm)
        tuned = arm if fork is None else fork[0]
        if not set(_tuning(tuned, results)) <= results.keys():
            raise SystemExit(f"{tuned!r} has no best rate yet: let the stage tune end first.")
        losses = _losses(tuned, "small", results)
        found[arm] = min(losses, key=lambda rate: losses[rate])
    return found


def _leaders(results: dict[Key, dict[str, Any]]) -> list[str]:
    """The three arms with the smallest loss on the medium rung, besides those that run anyway."""
    losses: dict[str, list[float]] = {}
    for (arm, rung, _, _), result in results.items():
        if rung == "medium" and not arm.startswith("dense") and arm != "slope":
            losses.setdefault(arm, []).append(result["loss"])
    return sorted(losses, key=lambda arm: sum(losses[arm]) / len(losses[arm]))[:3]


def queue(stage: str, lines: Path, workers: int, device: str, limit: float) -> None:
    """Run what a stage lacks, so many runs at a time. After ``limit`` seconds no run begins."""
    begun = time.monotonic()
    rows(CACHE)  # once, and not in each process

    def start(key: Key) -> None:
        if time.monotonic() - begun > limit:
            return
        arm, rung, rate, seed = key
        command = [
            sys.executable, __file__, "run", "--arm", arm, "--rung", rung, "--lr", str(rate),
            "--seed", str(seed), "--lines", str(lines), "--device", device,
        ]  # fmt: skip
        log = CACHE / f"{arm}-{rung}-{rate:g}-{seed}.log".replace(" ", "_").replace("/", "_")
        with log.open("w") as file:
            failed = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
        if failed:
            tqdm.write(f"{key} failed: see {log}.")

    tried: set[Key] = set()
    while True:  # the results of a round may ask for more runs: a grid of rates that grows
        results = done(lines)
        left = [k for k in planned(stage, results) if k not in results and k not in tried]
        if not left:
            break
        tried.update(left)
        with ThreadPoolExecutor(workers) as pool:
            list(tqdm(pool.map(start, left), total=len(left), desc=stage, unit="run"))
    for key in planned(stage, results):
        if key in results:
            result = results[key]
            print(f"{result['loss']:.4f} nats a byte  {result['seconds']:5.0f} s  {key}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("quick", "tune", "compare", "large", "run"))
    parser.add_argument("--lines", type=Path, default=LINES, help="file of the results")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after these")
    parser.add_argument("--arm", choices=list(ARMS))
    parser.add_argument("--rung", choices=list(RUNGS), default="small")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.stage != "run":
        queue(args.stage, args.lines, args.workers, args.device, args.seconds)
        return
    if args.arm is None or args.lr is None:
        parser.error("run needs --arm and --lr")
    torch.set_num_threads(1)
    result = run(args.arm, args.rung, args.lr, args.seed, args.device)
    args.lines.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{args.lines}.lock"), args.lines.open("a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
