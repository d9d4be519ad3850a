"""Memory of the training step: what is kept from step to step, and the most while one runs.

The state (weights, gradients, Adam's moments, masks) is counted on live tensors; the peak is
the process's resident memory over three steps, a process for each model.

    python benchmarks/memory.py
"""

import ctypes
import gc
import re
import subprocess
import sys
from pathlib import Path

import torch
from common import gpt2, parser, write
from tabulate import tabulate
from torch import nn

import slope_fx

MODELS = ("dense", "sparse")


def measure(name: str, sparsity: str, layers: int, width: int) -> dict[str, int]:
    """State and peak of one model, in bytes, over three steps in this process (Linux)."""
    torch.manual_seed(0)
    vocabulary, rows, context = 8192, 4, 256
    ids = torch.randint(0, vocabulary, (rows, context))
    model = gpt2(layers, width, vocabulary, context)
    if name == "sparse":
        slope_fx.compile(model, sparsity)
        prunes = set(slope_fx.sparse_weights(model))
    else:
        model.compile(backend="inductor")
        prunes = {
            f"transformer.h.{i}.{layer}"
            for i in range(layers)
            for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            if (i, layer) != (0, "attn.c_attn")
        }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    step()
    # What compiling took isn't the steps': give it back, and let the kernel count anew.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak is not None
    pruned = [
        parameter
        for key, parameter in model.named_parameters()
        if any(key.startswith(f"{layer}.weight") for layer in prunes)
    ]
    return {
        "pruned_linears": state_bytes(pruned, optimizer),
        "model": state_bytes(list(model.parameters()), optimizer),
        "peak_resident": 1024 * int(peak[1]),
    }


def state_bytes(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, gradients and Adam moments, on the live tensors."""
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    for p in parameters:
        tensors += [optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq") if optimizer.state[p]]
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sparsity", default="2:4")
    arguments.add_argument("--layers", type=int, default=6)
    arguments.add_argument("--width", type=int, default=768)
    arguments.add_argument("--only", choices=MODELS, help="measure one, here, and print it")
    args = arguments.parse_args()
    if args.only:
        print(*measure(args.only, args.sparsity, args.layers, args.width).values())
        return
    found: dict[str, dict[str, int]] = {}
    for name in MODELS:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        numbers = map(int, done.stdout.split()[-3:])
        found[name] = dict(zip(("pruned_linears", "model", "peak_resident"), numbers, strict=True))
    rows = [
        (what.replace("_", " "), *(found[name][what] / 2**20 for name in MODELS),
         found["sparse"][what] / found["dense"][what])
        for what in found["dense"]
    ]  # fmt: skip
    print(tabulate(rows, ("MiB", "dense", f"SLoPe {args.sparsity}", "ratio"), floatfmt=".3f"))
    write("memory", args, bytes=found)


if __name__ == "__main__":
    main()
