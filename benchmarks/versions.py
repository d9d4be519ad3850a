"""Is a checkout as fast as an older one: the training step and decoding, in turns in one run.

    python benchmarks/versions.py --before ../older-checkout

Each checkout has a process for each workload. The processes compile, and then wait; one at a time
takes a turn of several steps. What is reported is the ratio of the medians, and the quartiles of
the ratios of the pairs.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import slope_fx

ROOT = Path(__file__).resolve().parent.parent


def training(steps: int) -> Callable[[], None]:
    """GPT-2 of four blocks, width 768, 512 tokens: forward, backward, AdamW."""
    model = common.gpt2(4, 768, 1024, 512)
    slope_fx.compile(model, "2:4", engine="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, 1024, (1, 512))

    def turn() -> None:
        for _ in range(steps):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return turn


def adapters(steps: int) -> Callable[[], None]:
    """The same in the adapter phase."""
    model = common.gpt2(4, 768, 1024, 512)
    slope_fx.compile(model, "2:4", engine="cpu", adapter_rank=16)
    slope_fx.Schedule(model, 10**6, adapter_start=0.0)
    ids = torch.randint(0, 1024, (1, 512))

    def turn() -> None:
        for _ in range(steps):
            model(input_ids=ids, labels=ids).loss.backward()

    return turn


@torch.no_grad()
def decoding(steps: int) -> Callable[[], None]:
    """Llama of four blocks, width 768: one token at a time, without a cache."""
    config = LlamaConfig(
        num_hidden_layers=4, hidden_size=768, intermediate_size=2048, num_attention_heads=12,
        num_key_value_heads=12, vocab_size=1024, use_cache=False,
    )  # fmt: skip
    model = slope_fx.compile(LlamaForCausalLM(config), "2:4", engine="cpu").eval()
    ids = torch.randint(0, 1024, (1, 1))

    def turn() -> None:
        with torch.no_grad():
            for _ in range(10 * steps):
                model(ids, use_cache=False)

    return turn


WORKLOADS = {"training": training, "adapters": adapters, "decoding": decoding}


def serve(workload: str, steps: int) -> None:
    """Take a turn for each line that is read, and print its seconds."""
    torch.manual_seed(0)
    turn = WORKLOADS[workload](steps)
    turn()
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        turn()
        print(time.perf_counter() - begun, flush=True)


def start(root: Path, workload: str, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--serve", workload, "--steps", str(steps)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)])}
    process = subprocess.Popen(
        command, cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        if process.poll() is not None:
            raise SystemExit(f"{workload} of {root} failed")
    return process


def turn_of(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compared(before: Path, workload: str, steps: int, turns: int) -> dict[str, Any]:
    processes = {"before": start(before, workload, steps), "after": start(ROOT, workload, steps)}
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for turn in range(turns + 1):
        for name in sorted(processes, reverse=bool(turn % 2)):
            taken = turn_of(processes[name])
            if turn:
                seconds[name].append(taken)
    for process in processes.values():
        process.kill()
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    pairs = [b / a for b, a in zip(seconds["before"], seconds["after"], strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4)
    ratio = medians["before"] / medians["after"]
    print(f"{workload:10} {ratio:.3f} ({low:.3f} to {high:.3f})", flush=True)
    return {"seconds": medians, "speedup": ratio, "speedup_quartiles": [low, high]}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--before", type=Path, help="the older checkout")
    parser.add_argument("--steps", type=int, default=2, help="in a turn")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--serve", choices=WORKLOADS, help="for the script itself")
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.steps)
    if args.before is None:
        parser.error("--before is needed: the folder of an older checkout")
    before = args.before.resolve()
    found = {name: compared(before, name, args.steps, args.turns) for name in WORKLOADS}
    commit = ["git", "rev-parse", "--short", "HEAD"]
    args.before = subprocess.run(
        commit, cwd=before, capture_output=True, text=True, check=True
    ).stdout.strip()
    common.write("versions", args, workloads=found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
