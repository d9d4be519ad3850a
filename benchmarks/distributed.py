"""Bytes that each rank receives in a training step and in a refresh: dense against 2:4, counted.

Real gloo ranks on this machine run one step of a Llama under DDP and FSDP2. What they hand to the
collectives is counted; how it travels (a ring, a tree) is the library's matter. The numbers don't
depend on the machine.

    python benchmarks/distributed.py
"""

import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # the ranks import this file alone

import torch
import torch.distributed as dist
from common import parser, write
from tabulate import tabulate
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import slope_fx
from ranks import Ranks
from sent import Functional, counting

VOCABULARY, RANK = 256, 4  # 1.56% of the width
DTYPES = {"fp32": torch.float32, "bf16 compute": torch.float32, "bf16": torch.bfloat16}
WAYS = {
    "DDP": ("fp32", "bf16"),
    "FSDP2": tuple(DTYPES),
    "FSDP2, masks whole": tuple(DTYPES),
}
KINDS = ("dense", "2:4", "2:4, adapters active")


def make(kind: str, dtype: str, every: bool, width: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 128, intermediate_size=width * 11 // 4,
        vocab_size=VOCABULARY, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DTYPES[dtype])
    if kind == "dense":
        return model
    skips = {"skip_first": False, "skip_head": False} if every else {}
    return slope_fx.compile(model, "2:4", adapter_rank=RANK, backend="eager", engine="cpu", **skips)


def wrap(model: nn.Module, way: str, dtype: str) -> nn.Module:
    """The model in its wrapper, or sharded in place."""
    if way == "DDP":
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, allreduce_hook)  # what DDP does, where it can be counted
        return wrapped
    more: dict[str, Any] = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    if dtype == "bf16 compute":
        more["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if way == "FSDP2, masks whole":
        more["ignored_params"] = {p for p in model.parameters() if not p.is_floating_point()}
    for block in model.model.layers:  # type: ignore[union-attr]
        fully_shard(block, **more)
    return fully_shard(model, **more)


def measure(
    way: str, dtype: str, kind: str, every: bool, width: int, layers: int
) -> dict[str, int]:
    """Bytes of one rank. It runs on each."""
    model = make(kind, dtype, every, width, layers)
    wrapped = wrap(model, way, dtype)
    schedule = None
    if kind != "dense":
        start = 0.0 if "active" in kind else 1.0
        schedule = slope_fx.Schedule(model, 10, adapter_start=start, backward_mask_interval=1)
    ids = torch.randint(0, VOCABULARY, (1, 16))
    with counting() as step:
        wrapped(input_ids=ids, labels=ids).loss.backward()
    refresh: Counter[str] = Counter()
    if schedule is not None:
        schedule.step()  # the first step also looks whether adapters are trained already
        with counting() as refresh, Functional() as functional:
            schedule.step()
        refresh += functional.sent
    whole = sum(p.nbytes for p in model.parameters() if not hasattr(p, "to_local"))
    return {
        "all_gather": received(step, "all_gather"),
        "gradients": received(step, "reduce_scatter") + received(step, "all_reduce"),
        "refresh": sum(received(refresh, label) for label in refresh),
        "whole_on_each_rank": whole if way != "DDP" else 0,
    }


def received(sent: Counter[str], label: str) -> int:
    """What a rank receives, of what it gave to collectives, if they send nothing twice.

    An all-reduce is a reduce-scatter and an all-gather.
    """
    ranks = dist.get_world_size()
    others = {
        "all_gather": ranks - 1, "reduce_scatter": (ranks - 1) / ranks,
        "all_reduce": 2 * (ranks - 1) / ranks, "all_to_all": 1,
    }  # fmt: skip
    return round(sent[label] * others[label])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--width", type=int, default=256)
    arguments.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    args = arguments.parse_args()
    found: list[dict[str, Any]] = []
    pool = Ranks()
    for world, every, way in itertools.product(args.worlds, (False, True), WAYS):
        for dtype, kind in itertools.product(WAYS[way], KINDS):
            size = (args.width, args.layers)
            per_rank = pool.run(world, measure, way, dtype, kind, every, *size)
            worst = {key: max(rank[key] for rank in per_rank) for key in per_rank[0]}
            about = {"world": world, "every_linear": every, "way": way, "dtype": dtype}
            found.append({**about, "kind": kind, **worst})
            print(*found[-1].values(), flush=True)
    pool.close()
    rows = [
        (e["world"], e["every_linear"], e["way"], e["dtype"], e["kind"],
         *(f"{e[key] / base[key]:.3f}" if base[key] else "" for key in ("all_gather", "gradients")),
         e["refresh"])
        for e in found
        for base in found
        if base["kind"] == "dense" != e["kind"]
        and all(e[key] == base[key] for key in ("world", "every_linear", "way", "dtype"))
    ]  # fmt: skip
    headers = ("ranks", "all", "way", "dtype", "kind", "all-gathers", "gradients", "refresh")
    print(tabulate(rows, headers, disable_numparse=True))
    write("distributed", args, bytes=found)


if __name__ == "__main__":
    main()
