"""DeepSpeed's ZeRO-1 and ZeRO-2 on two processes: as one process without it, stopped and resumed.

DeepSpeed is built when it is installed, so the tests don't install it:

    DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8
"""

import importlib.util

import pytest
import torch.distributed as dist

import models
import slope_fx
from launched import (
    OPTIMIZER,
    STEPS,
    batch_of,
    launched,
    mean_over_ranks,
    plain_loop,
)
from models import loss_of
from parallel import assert_same, whole_state
from ranks import Ranks
from slope_fx.errors import UnsupportedError

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
    ),
]
STOP = 3


@pytest.fixture
def pool():
    """Processes of their own: DeepSpeed changes torch, and keeps its first process group."""
    made = Ranks()
    yield made
    made.close()


def model_of(rank):
    import torch

    torch.manual_seed(0)
    model = slope_fx.compile(models.gpt2(), adapter_rank=rank, backend="aot_eager", region="blocks")
    for weight in slope_fx.sparse_weights(model).values() if rank else ():
        torch.nn.init.normal_(weight.lora_B, std=0.05)
    return model


def engine_of(model, stage):
    import deepspeed
    import torch

    config = {
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 4 // dist.get_world_size(),
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train(stage, rank, folder):
    """Losses and the final state of a run that is stopped, and goes on in new objects."""
    losses = []
    with launched():
        for first, last in ((0, STOP), (STOP, STEPS)):
            model = model_of(rank)
            engine = engine_of(model, stage)
            schedule = slope_fx.Schedule(model, STEPS, 0.0, 3) if rank else None
            schedule = schedule or slope_fx.Schedule(model, STEPS, backward_mask_interval=3)
            if first:
                _, kept = engine.load_checkpoint(folder)
                schedule.load_state_dict(kept["schedule"])
            for step in range(first, last):
                loss = loss_of(engine, batch_of(step))
                engine.backward(loss)
                engine.step()
                schedule.step()
                losses.append(loss)
            engine.save_checkpoint(folder, client_state={"schedule": schedule.state_dict()})
        return {"losses": mean_over_ranks(losses), "state": whole_state(model)}


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("stage", [1, 2])
def test_as_one_process(pool, tmp_path, stage, rank, monkeypatch):
    import launched as one

    monkeypatch.setattr(one, "model_of", lambda name: model_of(rank))
    phases = {"adapter_start": 0.0} if rank else {}
    monkeypatch.setattr(one, "PHASES", {**phases, "backward_mask_interval": 3})
    want = plain_loop("gpt2")
    got, _ = pool.run(2, train, stage, rank, str(tmp_path), timeout=300)
    assert_same(got, want)


def idle(stage):
    with launched():
        model = model_of(4)
        engine_of(model, stage)
        with pytest.raises(UnsupportedError, match=r"c_proj: DeepSpeed.s ZeRO keeps one flat"):
            slope_fx.Schedule(model, STEPS, 0.5)


@pytest.mark.parametrize("stage", [1, 2])
def test_adapters_that_start_later_are_refused(pool, stage):
    pool.run(2, idle, stage, timeout=300)
