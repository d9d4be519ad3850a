"""Ranks that disagree are found at the first step, and named; so is what can't be sharded."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import models
import slope_fx
from parallel import batch, compiled, schedule_of
from slope_fx.sparse import agreement
from slope_fx.version import __version__


def disagreement(kind, wrap):
    """What the Schedule, or its first step, says on this rank where rank 1 does something else."""
    odd = dist.get_rank() == 1
    options, schedule = {}, {}
    if kind == "pattern":
        options["sparsity"] = {"*mlp.c_proj": "4:8" if odd else "2:4", "*": "2:4"}
    elif kind == "seed":
        options["seed"] = 7 if odd else 0
    elif kind == "rank":
        options["adapter_rank"] = 4 if odd else 2
    elif kind == "schedule":
        schedule["backward_mask_interval"] = 5 if odd else 3
    elif kind == "phase":
        schedule["adapter_start"] = 0.0 if odd else 0.5
    elif kind == "replicas":
        options["adapter_rank"] = 2
    elif kind == "version":
        agreement.__version__ = "0.1.9" if odd else __version__
    model = compiled("gpt2", "eager", **options)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "replicas":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if kind == "replicas" and dist.get_rank() >= 2:  # as from processes without a seed
        for weight in slope_fx.sparse_weights(model).values():
            nn.init.normal_(weight.lora_A)
    try:
        if wrap == "ddp":
            model_to_call = DistributedDataParallel(model)
        elif wrap == "fsdp":
            model_to_call = fully_shard(model, mesh=mesh)
        schedule = schedule_of(model, **schedule)
        models.loss_of(model_to_call, batch(0, dist.get_rank())).backward()
        schedule.step()
        if kind == "resumed":
            schedule.load_state_dict({**schedule.state_dict(), "last_step": 12 if odd else 2})
    except slope_fx.errors.StateError as error:
        return str(error)
    finally:
        agreement.__version__ = __version__
    return ""


@pytest.mark.parametrize(
    ("kind", "wrap", "message"),
    [
        ("pattern", "ddp", r"about layer transformer\.h\.0\.mlp\.c_proj: rank 1: 4:8 .* 2:4 "),
        ("pattern", "fsdp", r"about layer transformer\.h\.0\.mlp\.c_proj: rank 1: 4:8 .* 2:4 "),
        ("seed", "fsdp", r"about layer transformer\.h\.0\.attn\.c_proj: rank 1: .* mask .* 6 more"),
        ("schedule", "ddp", r"the Schedule's backward_mask_interval: rank 1: 5; .* 3\."),
        ("phase", "fsdp", r"the Schedule's adapter_step: rank 1: 0; .* 10\."),
        ("rank", "fsdp", r"\.attn\.c_proj: rank 1: .* adapter rank 4, .*: 2:4 .* adapter rank 2,"),
        ("version", "ddp", r"the version of slope_fx: rank 1: 0\.1\.9; "),
        ("resumed", "ddp", r"the Schedule's last_step: rank 1: 12; .* 2\."),
        ("resumed", "fsdp", r"the Schedule's last_step: rank 1: 12; .* 2\."),
    ],
)
def test_who_disagrees_about_what(ranks, kind, wrap, message):
    first, second, *_ = ranks.run(3, disagreement, kind, wrap)
    assert first == second
    with pytest.raises(slope_fx.errors.StateError, match=message):
        raise slope_fx.errors.StateError(first)


def test_replicas_of_shards_disagree(ranks):
    """FSDP2 compares no replicas: adapters of other seeds would train apart, and one be saved."""
    first, *others = ranks.run(4, disagreement, "replicas", "fsdp")
    assert re.search(r"about layer transformer\.h\.0\.attn\.c_proj: rank \d: .* adapter", first)
    assert all(others)


def test_agreement_says_nothing(ranks):
    """Other seeds in DDP, which gives all ranks the tensors of rank 0, are no disagreement."""
    assert ranks.run(2, disagreement, "nothing", "fsdp") == ["", ""]
    assert ranks.run(2, disagreement, "seed", "ddp") == ["", ""]


def stages(kind):
    """What the first step of two stages says, whose Schedules differ if ``kind`` says so."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    part = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
    x = torch.randn(4, 16)
    roles = {"skip_first": rank == 0, "skip_head": rank == 1}
    slope_fx.compile(part, example_inputs=x, adapter_rank=2, backend="aot_eager", **roles)
    interval = 5 if kind == "schedule" and rank else 3
    schedule = slope_fx.Schedule(part, 20, backward_mask_interval=interval)
    if kind == "resumed":
        schedule.load_state_dict({**schedule.state_dict(), "last_step": 4 if rank else 7})
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    run = ScheduleGPipe(stage, 2, lambda y, wanted: (y - wanted).mean())
    run.step(*[x] * (rank == 0), **({"target": x} if rank == 1 else {}))
    if rank == 1:
        dist.barrier()  # the later one raises
    try:
        schedule.step()
    except slope_fx.errors.StateError as error:
        return str(error)
    finally:
        if rank == 0:
            dist.barrier()
    return ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("schedule", r"the Schedule's backward_mask_interval: rank 1: 5; .* 3\."),
        ("resumed", r"the Schedule's last_step: rank 1: 5; .* 8\."),
        ("nothing", ""),
    ],
)
def test_stages_of_a_pipeline_are_compared(ranks, kind, message):
    first, second = ranks.run(2, stages, kind)
    assert first == ""
    assert re.search(message, second)
    assert bool(second) == bool(message)


def refusals():
    model = compiled("gpt2", "eager")
    with pytest.raises(slope_fx.errors.UnsupportedError, match="Use FSDP2"):
        FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    with pytest.raises(slope_fx.errors.UnsupportedError, match=r"ZeroRedundancy.*requires_grad"):
        ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)


def test_what_cannot_be_sharded_is_refused(ranks):
    ranks.run(1, refusals)
