"""What all benchmarks share: turns, medians with their spread, and the file of results."""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

import slope_fx

RESULTS = Path(__file__).parent / "results"


def interleave(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, in turns, after one turn that isn't counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(seconds: dict[str, list[float]], dense: str, ours: str) -> dict[str, Any]:
    """Medians, how many times faster ``ours`` is than ``dense``, and the spread of the pairs."""
    pairs = sorted(d / s for d, s in zip(seconds[dense], seconds[ours], strict=True))
    medians = {name: statistics.median(seconds[name]) for name in (dense, ours)}
    low, _, high = statistics.quantiles(pairs, n=4)
    return {
        "dense_seconds": medians[dense],
        "sparse_seconds": medians[ours],
        "speedup": medians[dense] / medians[ours],
        "speedup_quartiles": [low, high],
    }


def agree(got: torch.Tensor, want: torch.Tensor, what: str, tolerance: float) -> float:
    """The largest difference relative to the largest entry; exits if it is too large."""
    difference = ((got.double() - want.double()).abs().max() / want.abs().max()).item()
    if not difference <= tolerance:
        raise SystemExit(f"{what}: off by {difference:.2e} of its largest entry; nothing timed.")
    return difference


def gpt2(
    layers: int, width: int, vocab_size: int, context: int, dropout: float = 0.0
) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, heads of 64."""
    config = GPT2Config(
        n_layer=layers, n_head=width // 64, n_embd=width, vocab_size=vocab_size,
        n_positions=context, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model


def write(name: str, args: argparse.Namespace, **results: Any) -> None:
    """Write ``results/<name>.json``: how it was measured, on what, and what came out."""
    arguments = {k: v for k, v in vars(args).items() if k not in ("out", "only")}
    record = {
        "benchmark": name,
        "arguments": arguments,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "slope_fx": slope_fx.__version__,
        },
        **results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"Written to {path}.")


def rest(
    name: str, key: str, args: argparse.Namespace, **chosen: list[str]
) -> list[dict[str, Any]]:
    """The rows of a results file that a run of some models doesn't measure again.

    Rows of another processor are left out: a table is of one machine.
    """
    path = args.out / f"{name}.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    if (found["device"], found["threads"]) != (processor(), torch.get_num_threads()):
        return []
    rows: list[dict[str, Any]] = found[key]
    return [row for row in rows if any(row[field] not in of for field, of in chosen.items())]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the argument that all benchmarks take."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return made


def commit() -> str:
    """The commit that is measured; "-dirty" if more than the results differs from it."""
    try:
        name = git("describe", "--always")
        sources = (":/", ":(top,exclude)benchmarks/results")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
    except OSError:  # no git
        name, changed = "", ""
    return (name + "-dirty" * bool(changed)) or os.environ.get("SLOPE_FX_COMMIT", "")


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def processor() -> str:
    """The CPU's name, with what decides the speed of 16-bit products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line.split() for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
    found = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{name} ({', '.join(found)})"
