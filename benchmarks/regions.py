"""A user's first impression: how long until the first step is done, whole graph or by blocks.

A GPT-2 of 12 blocks through Inductor, with its own dropout, in a process of its own with an empty
cache, then in another with a warm one; then step times, in turns in one process, without dropout so
that the losses can be compared.

    python benchmarks/regions.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from common import compare, gpt2, interleave, parser, write
from tabulate import tabulate
from torch import nn

import slope_fx

KINDS = ("dense", "model", "auto")


def make(kind: str, args: argparse.Namespace, dropout: float) -> Any:
    """A step of the model, compiled as ``kind`` says."""
    torch.manual_seed(0)
    model: nn.Module = gpt2(args.layers, args.width, 8192, 256, dropout)
    if kind == "dense":
        model.compile(backend="inductor")
    else:
        slope_fx.compile(model, region=kind)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 8192, (args.rows, 128))

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def first_step(kind: str, args: argparse.Namespace) -> None:
    """Print, as JSON, how long the first step takes in this process, and what its caches did."""
    step = make(kind, args, dropout=0.1)
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    counters = torch._dynamo.utils.counters
    print(
        json.dumps({
            "seconds": seconds,
            "graph_cache_hits": counters["inductor"]["fxgraph_cache_hit"],
            "graph_cache_misses": counters["inductor"]["fxgraph_cache_miss"],
            "autograd_cache_hits": counters["aot_autograd"]["autograd_cache_hit"],
            "autograd_cache_misses": counters["aot_autograd"]["autograd_cache_miss"],
        })
    )  # fmt: skip


def in_process(kind: str, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--first-step", kind, *sys.argv[1:]]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--width", type=int, default=256)
    arguments.add_argument("--rows", type=int, default=4, help="sequences of 128 tokens")
    arguments.add_argument("--rounds", type=int, default=10)
    arguments.add_argument("--first-step", choices=KINDS, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.first_step:
        first_step(args.first_step, args)
        return
    del args.first_step
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as engines:
        in_process("auto", engines)  # so that engines are built, and measured, before
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = in_process(kind, cache), in_process(kind, cache)
        found[kind] = {"cold": cold, "warm": warm}
        print(f"{kind}: {cold['seconds']:.1f} s cold, {warm['seconds']:.1f} s warm", flush=True)
    steps = {kind: make(kind, args, dropout=0.0) for kind in KINDS}
    losses = {kind: step() for kind, step in steps.items()}
    if abs(losses["auto"] - losses["model"]) > 1e-4:
        raise SystemExit(f"The losses differ: {losses}.")
    seconds = interleave(steps, args.rounds)
    for kind in KINDS:
        found[kind]["step"] = compare(seconds, "model", kind)["sparse_seconds"]
    found["auto"]["step_speedup"] = compare(seconds, "model", "auto")
    found["auto"]["against_dense"] = compare(seconds, "dense", "auto")
    rows = [(k, f["cold"]["seconds"], f["warm"]["seconds"], f["step"]) for k, f in found.items()]
    print(tabulate(rows, ("", "first step, cold, s", "warm, s", "a step, s"), floatfmt=".2f"))
    write("regions", args, regions=found)


if __name__ == "__main__":
    main()
