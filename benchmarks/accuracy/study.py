"""Run the accuracy study. PROTOCOL.md says what is run and why.

A run is one process on one thread, and adds one JSON line to ``results/accuracy.jsonl``. A stage
runs what is not there yet, so it goes on after any kill; a run that was cut short begins again.

    python benchmarks/accuracy/study.py quick               # three arms in under ten minutes
    python benchmarks/accuracy/study.py tune --workers 2    # hours
    python benchmarks/accuracy/study.py compare --workers 2
    python benchmarks/accuracy/study.py run --arm slope --rung small --lr 8e-3 --seed 0
"""

import argparse
import contextlib
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
from arms import ARMS, RUNGS, cost, make, own_rates, set_backward
from data import rows
from filelock import FileLock
from torch import nn
from tqdm import tqdm

import slope_fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import RESULTS, commit, processor

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "accuracy"
LINES = RESULTS / "accuracy.jsonl"
CONTEXT, HELD_OUT_ROWS, EVALUATIONS = 256, 2048, 10
RATES = (4e-3, 8e-3, 16e-3)
"""Where the grid begins; it grows by a factor of two where the best rate is at its edge."""
TUNED_ON = "quick"
QUICK = {"dense": 8e-3, "slope": 16e-3, "transposable": 16e-3}
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
        yield from ((arm, TUNED_ON, rate, 0) for arm, rate in QUICK.items())
    elif stage == "tune":
        for rate in RATES:
            yield from ((arm, TUNED_ON, rate, 0) for arm in ARMS)
        tuned = _tuned(results)
        for arm in ARMS:
            if set(RATES) <= tuned.get(arm, {}).keys():
                yield from ((arm, TUNED_ON, rate, 0) for rate in _further(tuned[arm]))
    else:
        best = best_rates(results)
        rungs, seeds, arms = ("small", "medium"), (1, 2, 3), list(ARMS)
        if stage == "large":
            rungs, seeds, arms = ("large",), (1, 2), ["dense", "slope", *_leaders(results)]
        for rung in rungs:
            for seed in seeds:
                yield from ((arm, rung, best[arm], seed) for arm in arms)


def _tuned(results: dict[Key, dict[str, Any]]) -> dict[str, dict[float, float]]:
    """The losses of each arm by learning rate, on the rung of the stage tune with seed 0."""
    tuned: dict[str, dict[float, float]] = {}
    for (arm, rung, rate, seed), result in results.items():
        if rung == TUNED_ON and seed == 0:
            tuned.setdefault(arm, {})[rate] = result["loss"]
    return tuned


def _further(losses: dict[float, float]) -> list[float]:
    """The next rate, if the best one is at the edge of the grid."""
    best = min(losses, key=lambda rate: losses[rate])
    if best == max(losses):
        return [best * 2]
    return [best / 2] if best == min(losses) else []


def best_rates(results: dict[Key, dict[str, Any]]) -> dict[str, float]:
    """The learning rate with the smallest loss of each arm.

    Raises:
        SystemExit: the stage tune has not ended: an arm lacks rates, or its best one is at the
            edge of those that were run.
    """
    tuned = _tuned(results)
    for arm in ARMS:
        losses = tuned.get(arm, {})
        if not set(RATES) <= losses.keys() or _further(losses):
            raise SystemExit(f"{arm!r} has no best rate yet: let the stage tune end first.")
    return {arm: min(losses, key=lambda r: losses[r]) for arm, losses in tuned.items()}


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


def run(arm: str, rung: str, rate: float, seed: int, device: str) -> dict[str, Any]:
    """Train one model. The loss is that of the end."""
    size = RUNGS[rung]
    steps = size.tokens // (CONTEXT * size.batch)
    text = rows(CACHE, CONTEXT)
    torch.manual_seed(seed)
    model, schedule = make(ARMS[arm], size, CONTEXT, steps)
    model.to(device).train()
    order = torch.randperm(len(text["train"]), generator=torch.Generator().manual_seed(seed))
    if steps * size.batch > len(order):
        raise SystemExit(f"{rung} needs {steps * size.batch} rows; the text has {len(order)}.")
    groups = slope_fx.param_groups(
        model, rate, weight_decay=0.1, **own_rates(ARMS[arm], rate, steps)
    )
    trained = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    warmup = max(1, steps // 50)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    half: Any = contextlib.nullcontext()
    if device != "cpu":
        half = torch.autocast(device, torch.bfloat16)
    curve, seconds = [], 0.0
    for step in tqdm(range(steps), mininterval=5):
        started = time.perf_counter()
        set_backward(ARMS[arm], model, step, steps)
        ids = text["train"][order[step * size.batch : (step + 1) * size.batch]].long().to(device)
        with half:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if schedule is not None:
            schedule.step()
        seconds += time.perf_counter() - started
        if not loss.isfinite():
            break
        if (step + 1) % max(1, steps // EVALUATIONS) == 0 and step + 1 < steps:
            curve.append([step + 1, evaluate(model, text["held_out"][:256], device)])
    final = evaluate(model, text["held_out"][:HELD_OUT_ROWS], device)
    return {
        "arm": arm, "rung": rung, "lr": rate, "seed": seed, "steps": steps,
        "tokens": steps * size.batch * CONTEXT,
        "loss": final if math.isfinite(final) else math.inf, "curve": curve,
        "cost": cost(ARMS[arm], size), "seconds": seconds,
        "parameters": sum(p.numel() for p in trained), "commit": commit(),
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "versions": {"torch": str(torch.__version__), "slope_fx": slope_fx.__version__},
    }  # fmt: skip


@torch.no_grad()
def evaluate(model: nn.Module, held_out: torch.Tensor, device: str) -> float:
    """The mean loss in nats a byte."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        losses = [
            model(input_ids=ids, labels=ids, use_cache=False).loss.item()
            for ids in (part.long().to(device) for part in held_out.split(64))
        ]
    model.train()
    return sum(losses) / len(losses)


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
