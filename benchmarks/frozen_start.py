"""A server starts: loading, the first request and memory of frozen and dense models.

Each process loads a bf16 model from the disk and answers one request: a prompt of 64 tokens and 16
new ones, one compiled graph for the prefill and one for decoding, a static cache. "Cold" finds no
compiled code on the disk, "warm" finds that of the process before. Files are in the page cache.

    python benchmarks/frozen_start.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import commit, parser, rest, write
from frozen import MODELS
from tabulate import tabulate
from tqdm import tqdm

import slope_fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from resident import load, settled, status

PROMPT, TOKENS = 64, 16
FROZEN: dict[str, dict[str, Any]] = {
    "2:4": {},
    "2:4 + adapters": {"rank": 1 / 64},
    "2:4 int8": {"values": "int8"},
    "2:4 int4": {"values": "int4"},
}


class FirstToken:
    """A streamer of ``generate`` that notes when the first new token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())  # the prompt comes first

    def end(self) -> None:
        """Called after the last token."""


@torch.no_grad()
def child(road: str, path: str) -> None:
    """Load, answer, and print what it took as a line of JSON."""
    before = settled()
    started = time.perf_counter()
    model: Any = load(road, path, None)
    if road == "dense":
        model.compile()
    loaded = time.perf_counter()
    peak, resident = status("VmHWM") - before, settled() - before
    ids = torch.arange(PROMPT)[None]
    streamer = FirstToken()
    options = {"cache_implementation": "static", "max_new_tokens": TOKENS, "do_sample": False}
    begun = time.perf_counter()
    model.generate(ids, streamer=streamer, **options)
    answered = time.perf_counter()
    found = {
        "load_seconds": loaded - started,
        "load_peak": peak,
        "resident_loaded": resident,
        "first_token_seconds": streamer.times[1] - begun,
        "request_seconds": answered - begun,
    }
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        model.generate(ids, **options)
        times.append(time.perf_counter() - begun)
    sizes = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    print(json.dumps({
        **found, "steady_request_seconds": min(times), "resident_after": settled() - before,
        "bytes": sum(sizes.values()),
    }))  # fmt: skip


def run(road: str, path: Path, cache: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", road, str(path)], capture_output=True, text=True,
        check=False, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def save(name: str, folder: Path) -> dict[str, tuple[str, Path]]:
    """A dense and frozen checkpoints of the same size of model, and the road that loads each."""
    torch.manual_seed(0)
    dense = MODELS[name]().to(torch.bfloat16)
    dense.save_pretrained(folder / "dense")
    saved = {"dense": ("dense", folder / "dense")}
    for variant, options in FROZEN.items():
        rank = options.get("rank")
        model = slope_fx.compile(
            MODELS[name]().to(torch.bfloat16).eval(), adapter_rank=rank, backend=None
        )
        if rank:
            slope_fx.Schedule(model, 1, 0.0)
        slope_fx.freeze(model, values=options.get("values", "float"))
        slope_fx.save_pretrained(model, folder / variant)
        saved[variant] = ("frozen", folder / variant)
    return saved


def main() -> None:
    if "--child" in sys.argv:
        child(*sys.argv[2:])
        return
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    args = arguments.parse_args()
    rows = rest("frozen_start", "rows", args, model=args.models)
    for name in args.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for side, (road, path) in tqdm(save(name, folder).items(), desc=name):
                for kind in ("cold", "warm"):
                    cache = folder / f"cache-{len(rows) // 2}"  # g++ takes no space in a path
                    rows.append({"model": name, "side": side, "start": kind, "commit": commit(),
                                 **run(road, path, cache)})  # fmt: skip
                    print(rows[-1], flush=True)
        write("frozen_start", args, rows=rows)
    print(tabulate(rows, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
    main()
