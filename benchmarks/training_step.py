"""A training step of a GPT-2, SLoPe against dense, both under ``torch.compile``.

Interleaved in one process, with the same optimizer and batches. The losses are checked
before anything is timed: with a mask that prunes nothing the two would be equal, with 2:4
they can only be held to METHOD's formulas, which the tests do; here the sparse model must
agree with its own dense weights (``to_dense``) in a plain eager forward.

    python benchmarks/training_step.py --steps 15
"""

import argparse
import copy
import ctypes
import datetime
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from torch import nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import slope_fx

RESULTS = Path(__file__).parent / "results"
MODELS = ("dense", "sparse")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each model")
    parser.add_argument("--peak-of", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "training_step.json")
    return parser.parse_args()


def make_model(args: argparse.Namespace) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_layer=args.layers, n_head=args.heads, n_embd=args.width, vocab_size=args.vocab_size,
        n_positions=args.context, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model


def check(dense: nn.Module, sparse: nn.Module, ids: torch.Tensor) -> float:
    """The compiled sparse model's loss against an eager model of its expanded weights."""
    plain = copy.deepcopy(dense)
    parameters = dict(plain.named_parameters())
    for name, weight in slope_fx.sparse_weights(sparse).items():
        parameters[f"{name}.weight"].data.copy_(weight.to_dense().detach().t())
    want = plain(input_ids=ids, labels=ids).loss.item()
    got = sparse(input_ids=ids, labels=ids).loss.item()
    if abs(got - want) > 1e-5 * abs(want):
        raise SystemExit(f"The sparse model's loss is {got}, its expanded weights give {want}.")
    return abs(got - want) / abs(want)


def stepper(model: nn.Module, ids: torch.Tensor) -> tuple[Callable[[], float], Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step, optimizer


def state_bytes(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, gradients and Adam moments, on the live tensors."""
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    for p in parameters:
        tensors += [optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq") if optimizer.state[p]]
    return sum(t.numel() * t.element_size() for t in tensors)


def state(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> dict[str, int]:
    """State of the linears in the blocks that SLoPe prunes, and of the whole model."""
    model(input_ids=ids, labels=ids).loss.backward()
    names = [
        f"transformer.h.{i}.{layer}"
        for i in range(model.config.n_layer)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        if (i, layer) != (0, "attn.c_attn")
    ]
    pruned = [
        p
        for name, p in model.named_parameters()
        if any(name.startswith(f"{n}.weight") for n in names)
    ]
    sizes = {
        "pruned_linears": state_bytes(pruned, optimizer),
        "model": state_bytes(list(model.parameters()), optimizer),
    }
    optimizer.zero_grad()
    return sizes


def main() -> None:
    args = parse_arguments()
    if args.peak_of:
        print(peak(args))
        return
    torch.manual_seed(0)
    ids = torch.randint(0, args.vocab_size, (args.rows, args.context))
    dense = make_model(args)
    original = copy.deepcopy(dense)
    sparse = slope_fx.compile(copy.deepcopy(dense), args.sparsity, backend="inductor")
    dense.compile(backend="inductor")
    agreement = check(original, sparse, ids)

    steps, optimizers, compile_seconds = {}, {}, {}
    for name, model in (("dense", dense), ("sparse", sparse)):
        steps[name], optimizers[name] = stepper(model, ids)
        compile_seconds[name] = steps[name]()
        steps[name]()
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in tqdm(range(args.steps), unit="pair"):
        for name, step in steps.items():
            seconds[name].append(step())

    ratios = sorted(s / d for s, d in zip(seconds["sparse"], seconds["dense"], strict=True))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    memory = {name: state(m, optimizers[name], ids) for name, m in
              (("dense", dense), ("sparse", sparse))}  # fmt: skip
    resident = peaks()
    result = {
        "benchmark": "training_step",
        "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "peak_of")},
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__,
                     "slope_fx": slope_fx.__version__},
        "loss_agreement": agreement,
        "seconds": seconds,
        "median_seconds": medians,
        "ratio_of_medians": medians["sparse"] / medians["dense"],
        "ratio_quartiles": statistics.quantiles(ratios, n=4),
        "first_step_seconds": compile_seconds,
        "state_bytes": memory,
        "peak_resident_bytes": resident,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    rows = [
        ("step, median s", medians["dense"], medians["sparse"], result["ratio_of_medians"]),
        *(
            (
                f"state of {what.replace('_', ' ')}, MiB",
                memory["dense"][what] / 2**20,
                memory["sparse"][what] / 2**20,
                memory["sparse"][what] / memory["dense"][what],
            )
            for what in ("pruned_linears", "model")
        ),
        (
            "peak resident memory, MiB",
            resident["dense"] / 2**20,
            resident["sparse"] / 2**20,
            resident["sparse"] / resident["dense"],
        ),
    ]
    print(tabulate(rows, ("", "dense", f"SLoPe {args.sparsity}", "ratio"), floatfmt=".3f"))
    low, _, high = result["ratio_quartiles"]
    print(f"Half of the paired ratios lie between {low:.3f} and {high:.3f}. Written to {args.out}.")


def peak(args: argparse.Namespace) -> int:
    """Most bytes resident during three steps of one model, in a process of its own (Linux)."""
    torch.manual_seed(0)
    ids = torch.randint(0, args.vocab_size, (args.rows, args.context))
    model = make_model(args)
    if args.peak_of == "sparse":
        slope_fx.compile(model, args.sparsity, backend="inductor")
    else:
        model.compile(backend="inductor")
    step, _ = stepper(model, ids)
    step()
    # What compiling took isn't the steps': give it back, and let the kernel count anew.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


def peaks() -> dict[str, int]:
    """The peak of each model, measured in a process of its own with this one's arguments."""
    found = {}
    for name in MODELS:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = int(done.stdout.split()[-1])
    return found


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS.parent, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
