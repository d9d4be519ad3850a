"""A training step of a GPT-2 with AdamW, SLoPe against dense, both under ``torch.compile``.

Interleaved in one process, with the same optimizer and batch: fp32 at 2:4 and 2:8, then
both dense and 2:4 under bf16 autocast. Each sparse model's loss is first held against a
plain eager model of its own dense weights (``to_dense``). A profile of one step says what
the time is made of.

    python benchmarks/training_step.py
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from common import compare, gpt2, interleave, parser, write
from tabulate import tabulate
from torch import nn

import slope_fx

PATTERNS = {"float32": ("2:4", "2:8"), "bfloat16": ("2:4",)}
PARTS = {
    "sparse products": ("slope_fx::sparse_",),
    "dense products": ("aten::mm", "aten::addmm", "aten::bmm", "mkl::", "mkldnn::"),
    "attention": ("aten::_scaled_dot_product",),
    "optimizer": ("Optimizer.step",),
}
"""What a profiled step is sorted into, by the names of its events; the rest is "other"."""


def check(dense: nn.Module, sparse: nn.Module, ids: torch.Tensor) -> float:
    """The compiled sparse model's loss against an eager model of its expanded weights."""
    plain = copy.deepcopy(dense)
    parameters = dict(plain.named_parameters())
    for name, weight in slope_fx.sparse_weights(sparse).items():
        parameters[f"{name}.weight"].data.copy_(weight.to_dense().detach().t())
    with torch.no_grad():
        want = plain(input_ids=ids, labels=ids).loss.item()
    got = sparse(input_ids=ids, labels=ids).loss.item()
    if not abs(got - want) <= 1e-5 * abs(want):
        raise SystemExit(f"The sparse model's loss is {got}, its expanded weights give {want}.")
    return abs(got - want) / abs(want)


def stepper(model: nn.Module, ids: torch.Tensor, autocast: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def breakdown(step: Callable[[], None]) -> dict[str, float]:
    """Seconds of one profiled step by :data:`PARTS`."""
    started = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
        whole = time.perf_counter() - started
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in profile.key_averages():
        for part, names in PARTS.items():
            if event.key.startswith(names):
                # An optimizer's step is an event around others; a product is one by itself.
                spent = event.cpu_time_total if part == "optimizer" else event.self_cpu_time_total
                seconds[part] += spent / 1e6
    return {**seconds, "other": whole - sum(seconds.values())}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=6)
    arguments.add_argument("--width", type=int, default=768)
    arguments.add_argument("--vocab-size", type=int, default=8192)
    arguments.add_argument("--rows", type=int, default=4)
    arguments.add_argument("--context", type=int, default=256)
    arguments.add_argument("--steps", type=int, default=11, help="timed steps of each model")
    args = arguments.parse_args()
    torch.manual_seed(0)
    ids = torch.randint(0, args.vocab_size, (args.rows, args.context))
    dense = gpt2(args.layers, args.width, args.vocab_size, args.context)
    original = copy.deepcopy(dense)
    models: dict[str, nn.Module] = {"dense": dense}
    dense.compile(backend="inductor")
    agreement = {}
    for pattern in PATTERNS["float32"]:
        models[pattern] = slope_fx.compile(copy.deepcopy(original), pattern)
        agreement[pattern] = check(original, models[pattern], ids)

    runs: dict[str, Any] = {}
    for dtype, patterns in PATTERNS.items():
        chosen = {name: models[name] for name in ("dense", *patterns)}
        steps = {name: stepper(m, ids, dtype != "float32") for name, m in chosen.items()}
        first = {}
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            first[name] = time.perf_counter() - started
        seconds = interleave(steps, args.steps)
        runs[dtype] = {
            "first_step_seconds": first,
            "steps": {pattern: compare(seconds, "dense", pattern) for pattern in patterns},
            "breakdown": {name: breakdown(step) for name, step in steps.items()},
        }
    rows = [
        (dtype, pattern, step["dense_seconds"], step["sparse_seconds"], step["speedup"],
         "{:.2f} to {:.2f}".format(*step["speedup_quartiles"]))
        for dtype, run in runs.items() for pattern, step in run["steps"].items()
    ]  # fmt: skip
    headers = ("dtype", "N:M", "dense s", "sparse s", "times faster", "half of the pairs")
    print(tabulate(rows, headers, floatfmt=".2f"))
    for dtype, run in runs.items():
        print(f"\nWhat a step in {dtype} is made of, seconds:")
        print(tabulate(
            [(name, *parts.values()) for name, parts in run["breakdown"].items()],
            ("", *PARTS, "other"), floatfmt=".2f",
        ))  # fmt: skip
    explanation = slope_fx.explain(models["2:4"]).to_dict()
    write("training_step", args, loss_difference=agreement, runs=runs, explain=explanation)


if __name__ == "__main__":
    main()
