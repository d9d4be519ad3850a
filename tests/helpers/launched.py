"""Trainers on the ranks of the pool: torchrun's environment, and one training for all of them."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

import models
import slope_fx
from models import loss_of
from parallel import whole_state

STEPS, GLOBAL_BATCH = 8, 4
RUNS = [(0, 2), (2, 6), (6, STEPS)]  # interrupted in the sparse and in the adapter phase
AT_THE_ADAPTERS = [(0, STEPS // 2), (STEPS // 2, STEPS)]  # interrupted where they begin
PHASES = {"adapter_start": 0.5, "backward_mask_interval": 3}
ROWS = torch.randint(
    0, models.VOCABULARY, (STEPS * GLOBAL_BATCH, 12), generator=torch.Generator().manual_seed(5)
)
DATA = [{"input_ids": row, "labels": row} for row in ROWS]
OPTIMIZER = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.0}  # eps: as in parallel.adamw


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """The environment that torchrun gives to a rank. Accelerate is as in a new process."""
    from accelerate.state import AcceleratorState, GradientState

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    given = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    before = dict(os.environ)
    os.environ.update(given)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def as_on_gpus() -> None:
    """Let Accelerate shard on a CPU.

    It ignores FSDP on processes that it knows as CPU-only, and makes a DDP. The device stays "cpu".
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def batch_of(step: int) -> torch.Tensor:
    """The rows of this rank at a step."""
    share = GLOBAL_BATCH // dist.get_world_size()
    first = step * GLOBAL_BATCH + dist.get_rank() * share
    return ROWS[first : first + share]


def mean_over_ranks(losses: list[torch.Tensor]) -> list[float]:
    means = torch.stack([loss.detach().float() for loss in losses])
    dist.all_reduce(means)
    return (means / dist.get_world_size()).tolist()


def model_of(name: str) -> Any:
    """A compiled model. With "+" in its name, the adapters add much as soon as they are active."""
    torch.manual_seed(0)
    model = getattr(models, name.strip("+"))()
    slope_fx.compile(model, adapter_rank=4, backend="eager", region="blocks")
    for weight in slope_fx.sparse_weights(model).values() if "+" in name else ():
        nn.init.normal_(weight.lora_B, std=0.05)
    return model


def plain_loop(
    name: str, clip: float | None = 1.0, optimizer_of: Any = None, scaler: Any = None
) -> dict[str, Any]:
    """What all trainers must give: a loop in one process."""
    model = model_of(name)
    schedule = slope_fx.Schedule(model, STEPS, **PHASES)
    make = optimizer_of or (lambda model: torch.optim.AdamW(model.parameters(), **OPTIMIZER))
    optimizer, losses = make(model), []
    for step in range(STEPS):
        loss = loss_of(model, ROWS[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH])
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "state": whole_state(model)}


class StopAt(TrainerCallback):
    """An interruption of transformers' Trainer, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
