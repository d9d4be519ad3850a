"""Resident memory of loading, measured in a process of its own.

``python resident.py ROAD PATH [DTYPE]`` loads the model in PATH and prints a line of JSON: bytes
that became resident by loading, the most while loading, and the bytes of the model. ROAD is "dense"
and "opened", from_pretrained of transformers, or "training" and "frozen", ``load_pretrained``.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch
import transformers

import slope_fx


def load(road: str, path: str, dtype: str | None) -> torch.nn.Module:
    """The model in ``path``."""
    if road in ("dense", "opened"):
        more = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        return transformers.AutoModelForCausalLM.from_pretrained(path, **more)
    frozen = road == "frozen" or None
    return slope_fx.load_pretrained(path, frozen=frozen, dtype=dtype)


def status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if field in s)
    return int(line.split()[1]) * 1024


def settled() -> int:
    """The resident memory without what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def main(road: str, path: str, dtype: str | None = None) -> None:
    """Load twice: the first time loads libraries and measures routes."""
    load(road, path, dtype)
    before = settled()
    Path("/proc/self/clear_refs").write_text("5")  # restarts VmHWM
    model = load(road, path, dtype)
    peak = status("VmHWM") - before
    size = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    told = {"resident": settled() - before, "peak": peak, "model": size}
    with torch.no_grad():
        model.generate(torch.arange(8)[None], max_new_tokens=4, do_sample=False)
    print(json.dumps({**told, "generated": settled() - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
