"""Optimizers in their default settings on two processes: as in one, in both phases.

Each clips the norm of the gradients, and holds ``model.parameters()``, unless it takes none that
don't train.
"""

import traceback
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from schedulefree import AdamWScheduleFree
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adafactor, AdamW, Muon

import slope_fx
from launched import OPTIMIZER, PHASES, STEPS, batch_of, mean_over_ranks, model_of, plain_loop
from models import loss_of
from parallel import assert_same, whole_state


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def matrices(model):
    return [p for p in trained(model) if p.ndim == 2]


def schedule_free(model):
    optimizer = AdamWScheduleFree(model.parameters(), lr=1e-2, eps=1e-4)
    optimizer.train()
    return optimizer


def warming_up(model):
    rate = OPTIMIZER["lr"]
    groups = slope_fx.param_groups(model, rate, adapter_lr=4 * rate, adapter_warmup=3)
    return AdamW(groups, **OPTIMIZER)


class MuonInFloat32(Muon):
    """Muon rounds to bfloat16, where the order of a sum changes bits of the masks."""

    def step(self, closure=None):
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
            return super().step(closure)


OPTIMIZERS = {
    "AdamW": lambda m: AdamW(m.parameters(), **OPTIMIZER),
    "AdamW, foreach": lambda m: AdamW(m.parameters(), foreach=True, **OPTIMIZER),
    "AdamW, fused": lambda m: AdamW(m.parameters(), fused=True, **OPTIMIZER),
    "AdamW, adapters warm up": warming_up,
    "SGD": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9),
    "Adafactor": lambda m: Adafactor(m.parameters(), lr=1e-2),
    "Muon": lambda m: MuonInFloat32(matrices(m), lr=1e-2),
    "schedule-free": schedule_free,
    "ZeRO": lambda m: ZeroRedundancyOptimizer(trained(m), AdamW, **OPTIMIZER),
    "AdamW, GradScaler": lambda m: AdamW(m.parameters(), **OPTIMIZER),
}


def fsdp(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPS = {"DDP": DistributedDataParallel, "FSDP2": fsdp}


def train(wrap, name):
    model = model_of("gpt2")
    wrapped = WRAPS[wrap](model)
    optimizer = OPTIMIZERS[name](model)
    schedule = slope_fx.Schedule(model, STEPS, **PHASES)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled="GradScaler" in name)
    losses = []
    for step in range(STEPS):
        loss = loss_of(wrapped, batch_of(step))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss)
    return {"losses": mean_over_ranks(losses), "state": whole_state(model)}


def train_all(wrap, names):
    results = {}
    for name in names:
        try:
            results[name] = train(wrap, name)
        except Exception:
            results[name] = traceback.format_exc()
    return results


_results = {}


def results(ranks, wrap, full):
    """All optimizers run in one call, so that they share compiled code."""
    if (wrap, full) not in _results:
        names = [n for n in OPTIMIZERS if (wrap, n) not in REFUSED and (n not in IN_CI) == full]
        _results[wrap, full] = ranks.run(2, train_all, wrap, names, timeout=580)
    return _results[wrap, full]


# ZeRO is another way to shard. torch's Adafactor has no rule for DTensors.
REFUSED = {("FSDP2", "ZeRO"), ("FSDP2", "Adafactor")}
IN_CI = {("FSDP2", "AdamW")}
CASES = [
    pytest.param(wrap, name, marks=[] if (wrap, name) in IN_CI else [pytest.mark.full])
    for wrap in WRAPS
    for name in OPTIMIZERS
    if (wrap, name) not in REFUSED
]


@pytest.mark.parametrize(("wrap", "name"), CASES)
def test_equal_to_one_process(ranks, wrap, name):
    want = plain_loop("gpt2", optimizer_of=OPTIMIZERS["AdamW" if name == "ZeRO" else name])
    for one in results(ranks, wrap, name not in IN_CI):
        got = one[name]
        assert not isinstance(got, str), got
        assert_same(got, want)


def test_deepspeed_with_idle_adapters_is_refused():
    """DeepSpeed sets the attribute on the parameters of its flat tensors."""
    model = model_of("gpt2")
    schedule = slope_fx.Schedule(model, STEPS, adapter_start=0.5)
    for parameter in trained(model):
        parameter._hp_mapping = None
    with pytest.raises(slope_fx.errors.UnsupportedError, match=r"c_proj: DeepSpeed's ZeRO"):
        schedule.step()
    slope_fx.Schedule(model, STEPS, adapter_start=0).step()


@pytest.mark.full
def test_adafactor_of_torch_has_no_rule_for_shards(ranks):
    for one in ranks.run(2, train_all, "FSDP2", ["Adafactor"]):
        assert "propagation failed for aten.pow_.Scalar" in one["Adafactor"]
