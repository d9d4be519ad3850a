"""Ranks that disagree are found at the first step, and named; so is what can't be sharded."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import models
import slope_fx
from parallel import batch, compiled, schedule_of


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
    model = compiled("gpt2", "eager", **options)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    try:
        if wrap == "ddp":
            model_to_call = DistributedDataParallel(model)
        elif wrap == "fsdp":
            model_to_call = fully_shard(model, mesh=mesh)
        schedule = schedule_of(model, **schedule)
        models.loss_of(model_to_call, batch(0, dist.get_rank())).backward()
        schedule.step()
    except slope_fx.errors.StateError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "wrap", "message"),
    [
        ("pattern", "ddp", r"about layer transformer\.h\.0\.mlp\.c_proj: rank 1: 4:8 .* 2:4 "),
        ("pattern", "fsdp", r"about layer transformer\.h\.0\.mlp\.c_proj: rank 1: 4:8 .* 2:4 "),
        ("seed", "fsdp", r"about layer transformer\.h\.0\.attn\.c_proj: rank 1: .* mask .* 6 more"),
        ("schedule", "ddp", r"the Schedule's backward_mask_interval: rank 1: 5; .* 3\."),
        ("phase", "fsdp", r"the Schedule's adapter_step: rank 1: 0; .* 10\."),
    ],
)
def test_who_disagrees_about_what(ranks, kind, wrap, message):
    first, second, *_ = ranks.run(3, disagreement, kind, wrap)
    assert first == second
    with pytest.raises(slope_fx.errors.StateError, match=message):
        raise slope_fx.errors.StateError(first)


def test_agreement_says_nothing(ranks):
    """Other seeds in DDP, which gives all ranks the tensors of rank 0, are no disagreement."""
    assert ranks.run(2, disagreement, "nothing", "fsdp") == ["", ""]
    assert ranks.run(2, disagreement, "seed", "ddp") == ["", ""]


def refusals():
    model = compiled("gpt2", "eager")
    with pytest.raises(slope_fx.errors.UnsupportedError, match="Use FSDP2"):
        FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    with pytest.raises(slope_fx.errors.UnsupportedError, match=r"ZeroRedundancy.*requires_grad"):
        ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)


def test_what_cannot_be_sharded_is_refused(ranks):
    ranks.run(1, refusals)
