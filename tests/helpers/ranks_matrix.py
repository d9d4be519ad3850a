"""Each way to train on several ranks, beside one process: how far losses and weights are apart.

    python tests/helpers/ranks_matrix.py --write benchmarks/results/ranks.json

20 steps of AdamW with a refresh of the backward masks every 3, the adapters from the middle on.
"""

import argparse
import datetime
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("SLOPE_FX_ENGINES", "cpu")

import torch

from consistency import digest
from parallel import STEPS
from ranks import Ranks
from ways import reference, train

DISTRIBUTED = Path(__file__).parent.parent / "distributed"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CASES = [  # way, model, backend, ranks, micro-batches
    *[
        (way, name, backend, world, 1)
        for backend in ("inductor", "aot_eager")
        for world in (2, 4)
        for way, name in (
            ("DDP", "gpt2"), ("DDP, static graph", "gpt2"), ("FSDP2", "gpt2"), ("HSDP", "llama"),
            ("TP", "llama" if world == 2 else "llama_four_heads"), ("FSDP2 x TP", "llama"),
        )
        if world == 4 or way not in ("HSDP", "FSDP2 x TP")
    ],
    ("FSDP2", "llama", "aot_eager", 3, 1),
    ("FSDP2, masks whole", "gpt2", "aot_eager", 2, 1),
    ("DDP", "gpt2", "aot_eager", 2, 2),
    ("FSDP2, no reshard", "gpt2", "aot_eager", 2, 2),
]  # fmt: skip
BOUND = 2e-5
PIPELINE_WEIGHTS = 5e-4
"""One process with Inductor is 2e-4 from one with aot_eager, with AdamW's default eps."""
HELPERS = ("ranks_matrix", "ranks", "parallel", "ways", "models", "../distributed/test_pipeline")
PIPELINES = [(kind, backend, world) for backend in ("inductor", "aot_eager") for world in (2, 4)
             for kind in ("GPipe", "1F1B")]  # fmt: skip


def compared(losses: list[float], state: Any, want: list[float], wanted: Any) -> dict[str, Any]:
    """The largest differences, and the number of other bits of masks."""
    apart = [abs(a - b) for a, b in zip(losses, want, strict=True)]
    masks = [n for n, t in wanted.items() if t.dtype is torch.uint8]
    weights = [n for n in wanted if n not in masks]
    bits = sum(int((state[n] ^ wanted[n]).count_nonzero()) for n in masks)
    return {
        "loss_sparse": max(apart[: STEPS // 2]),
        "loss_adapter": max(apart[STEPS // 2 :]),
        "weights": max((state[n] - wanted[n]).abs().max().item() for n in weights),
        "mask_bytes": bits,
    }


def wrong(row: dict[str, Any]) -> bool:
    """Whether a row is further from one process than rounding takes it."""
    weights = PIPELINE_WEIGHTS if row["way"].startswith("PP") else BOUND
    bounds = {"loss_sparse": BOUND, "loss_adapter": BOUND, "weights": weights, "mask_bytes": 0}
    return not all(row[key] <= bound for key, bound in bounds.items())


def data_and_tensor(pool: Ranks, case: Any) -> dict[str, Any]:
    """One case of :data:`CASES`."""
    way, name, backend, world, micro = case
    want = reference(way, name, world, micro)
    got = pool.run(world, train, way, name, backend, micro, timeout=900)
    losses = [sum(one["losses"][i] for one in got) / world for i in range(STEPS)]
    one = compared(losses, got[0]["state"], want["losses"], want["state"])
    return {"way": way, "model": name, "backend": backend, "ranks": world, "micro": micro, **one}


def pipelines(pool: Ranks, case: Any) -> dict[str, Any]:
    """One case of :data:`PIPELINES`: a stage a rank, deep copies without the other layers."""
    import test_pipeline

    kind, backend, world = case
    losses, state = test_pipeline.alone(4, backend="aot_eager")
    args = "of_copies", kind, 4, world, 1, backend
    got = pool.run(world, test_pipeline.in_stages, *args, timeout=900)
    parts: dict[str, Any] = {}
    for one in got:
        parts |= one[1]
    found = next(one[0] for one in got if one[0])
    row = {"way": f"PP, {kind}", "model": "decoder", "backend": backend, "ranks": world}
    return {**row, "micro": test_pipeline.MICRO, **compared(found, parts, losses, state)}


def _done(file: Path | None, sources: str) -> list[dict[str, Any]]:
    """The rows of a run that was stopped, if the sources are the same."""
    if file is None or not file.is_file():
        return []
    known = json.loads(file.read_text())
    return known["rows"] if known["sources"] == sources else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="a file for the results")
    parser.add_argument("--only", default="", help="ways that have this in their name")
    args = parser.parse_args()
    sys.path[:0] = [str(DISTRIBUTED), str(BENCHMARKS)]
    from common import commit

    torch.set_num_threads(1)
    pool = Ranks()
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "sources": digest(HELPERS),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "steps": STEPS,
    }
    rows = _done(args.write, about["sources"])
    todo: list[tuple[Any, Any]] = [(data_and_tensor, c) for c in CASES]
    todo += [(pipelines, (f"{kind}", *rest)) for kind, *rest in PIPELINES]
    for run, case in todo:
        if args.only not in f"{case[0]}":
            continue
        start = time.monotonic()
        found = next((row for row in rows if row["case"] == list(map(str, case))), None)
        if found is None:
            rows.append({"case": list(map(str, case)), **run(pool, case)})
            if args.write:  # after each case, so that a stopped run goes on from there
                args.write.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        print(f"{time.monotonic() - start:5.0f} s", found or rows[-1], flush=True)
    pool.close()
    bad = [row for row in rows if wrong(row)]
    sys.exit(f"not as in one process: {bad}" if bad else 0)


if __name__ == "__main__":
    main()
