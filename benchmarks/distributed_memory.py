"""Memory of a rank while a sharded model is built, refreshed, saved and loaded, against its shard.

Two counts over each stage. Above the shard (the rank's parameters, buffers and Adam's moments):
the bytes of the live tensors that operations made. Above what is resident in the end or was before:
the most anonymous memory of the process, sampled, which also has what operations take inside and
what libraries take. A block is one of the model's, dense.

    python benchmarks/distributed_memory.py
"""

import contextlib
import gc
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # the ranks import this file alone

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import parser, write
from tabulate import tabulate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import slope_fx
from peak import Peak
from ranks import Ranks
from slope_fx.checkpoints import TrainingState, load_dense, load_training


def dense(width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 128, intermediate_size=width * 11 // 4, vocab_size=2 * width,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def shard(model: Any) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def local_bytes(*tensors: Any) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def held(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of the shards of this rank."""
    state = [] if optimizer is None else optimizer.state.values()
    moments = [s[k] for s in state if s for k in ("exp_avg", "exp_avg_sq")]
    return local_bytes(*model.parameters(), *model.buffers(), *moments)


class Watch:
    """Measures the stages, on one rank."""

    def __init__(self) -> None:
        self.tensors = Peak()
        self.found: dict[str, dict[str, int]] = {}

    @contextlib.contextmanager
    def stage(self, name: str, shards: Callable[[], int]) -> Iterator[None]:
        """Count from here to the end, above what ``shards`` returns in the end."""
        gc.collect()
        self.tensors.restart()
        before, resident = anonymous(), [0]
        ended = threading.Event()

        def sample() -> None:
            while not ended.is_set():
                resident[0] = max(resident[0], anonymous())
                time.sleep(0.001)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        gc.collect()
        own = shards()
        self.found[name] = {
            "shard": own,
            "tensors_above": self.tensors.peak - own,
            # What is there in the end, such as new shards, is no surplus.
            "resident_above": resident[0] - max(before, anonymous()),
        }


def anonymous() -> int:
    """Bytes of the process's memory that isn't of files (Linux)."""
    status = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert status is not None
    return 1024 * int(status[1])


def stages(folder: str, width: int, layers: int) -> dict[str, dict[str, int]]:
    """All stages, on one rank: of a small model first, so that libraries have what they keep."""
    _stages(Path(folder) / "small", 128, 1)
    return _stages(Path(folder) / "large", width, layers)


def _stages(path: Path, width: int, layers: int) -> dict[str, dict[str, int]]:
    watch = Watch()
    with watch.tensors:
        _build_and_save(watch, path, width, layers)
        _load(watch, path)
        _load_dense(watch, path, width, layers)
    return watch.found


def _build_and_save(watch: Watch, path: Path, width: int, layers: int) -> None:
    with watch.stage("build: meta, fully_shard, to_empty, init_weights", lambda: held(model)):
        model: Any = slope_fx.compile(dense(width, layers), adapter_rank=8, backend=None)
        shard(model)
        model.to_empty(device="cpu")
        model.init_weights()
    with watch.stage("refresh of all masks", lambda: held(model)):
        for weight in slope_fx.sparse_weights(model).values():
            weight.refresh_backward_mask()
    with watch.stage("save_pretrained", lambda: held(model)):
        slope_fx.save_pretrained(model, path / "sparse")
    _save_and_load_a_run(watch, path, model)
    schedule = slope_fx.Schedule(model, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    with watch.stage("load_training", lambda: held(model, optimizer)):
        load_training(path / "run", {"optimizer": optimizer, "schedule": schedule})


def _save_and_load_a_run(watch: Watch, path: Path, model: Any) -> None:
    schedule = slope_fx.Schedule(model, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and ".lora_" not in name:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    run = {"optimizer": optimizer, "schedule": schedule}
    state = {"training": TrainingState(model, optimizer, schedule)}
    with watch.stage("save_pretrained, with the optimizer", lambda: held(model, optimizer)):
        slope_fx.save_pretrained(model, path / "run", training=run)
    with watch.stage("DCP save", lambda: held(model, optimizer)):
        dcp.save(state, checkpoint_id=path / "dcp")
    with watch.stage("DCP load", lambda: held(model, optimizer)):
        dcp.load(state, checkpoint_id=path / "dcp")
    with watch.stage("load_pretrained into a model that has data", lambda: held(model, optimizer)):
        slope_fx.load_pretrained(path / "sparse", model)


def _load(watch: Watch, path: Path) -> None:
    with watch.stage("load_pretrained: meta, fully_shard, load", lambda: held(model)):
        model: Any = slope_fx.load_pretrained(path / "sparse", device="meta", backend=None)
        shard(model)
        slope_fx.load_pretrained(path / "sparse", model)


def _load_dense(watch: Watch, path: Path, width: int, layers: int) -> None:
    with watch.stage("load_dense: meta, fully_shard, to_empty, load", lambda: held(model)):
        model: Any = slope_fx.compile(dense(width, layers), adapter_rank=8, backend=None)
        shard(model)
        model.to_empty(device="cpu")
        load_dense(path / "dense", model)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--width", type=int, default=512)
    arguments.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    args = arguments.parse_args()
    whole = dense(args.width, args.layers)
    sizes = {
        "model": local_bytes(*whole.parameters()),
        "block": local_bytes(*whole.model.layers[0].parameters()),
        "largest_parameter": max(p.nbytes for p in whole.parameters()),
    }
    # Freed memory goes back to the system, so that what is resident is what lives.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    found: list[dict[str, Any]] = []
    for world in args.worlds:
        folder = Path(tempfile.mkdtemp())
        pool = Ranks()  # fresh processes
        try:
            for name, size in (("small", (128, 1)), ("large", (args.width, args.layers))):
                filled = dense(*size).to_empty(device="cpu")
                filled.init_weights()
                filled.save_pretrained(folder / name / "dense")
                del filled
            per_rank = pool.run(world, stages, str(folder), args.width, args.layers, timeout=900)
        finally:
            pool.close()
            shutil.rmtree(folder)
        for stage in per_rank[0]:
            worst = {k: max(rank[stage][k] for rank in per_rank) for k in per_rank[0][stage]}
            found.append({"world": world, "stage": stage, **worst})
    rows = [
        (e["world"], e["stage"], f"{e['shard'] / 2**20:.1f}",
         *(f"{e[k] / 2**20:.1f}" for k in ("tensors_above", "resident_above")),
         f"{e['tensors_above'] / sizes['block']:.2f}")
        for e in found
    ]  # fmt: skip
    print({name: f"{size / 2**20:.1f} MiB" for name, size in sizes.items()})
    headers = ("ranks", "stage", "shard", "tensors above", "resident above", "blocks above")
    print(tabulate(rows, headers, disable_numparse=True))
    write("distributed_memory", args, sizes=sizes, stages=found)


if __name__ == "__main__":
    main()
