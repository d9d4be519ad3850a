"""A run of a trainer as its users start it: by torchrun, with slope_fx in its default settings.

    torchrun --nproc-per-node 2 under_torchrun.py KIND FILE

KIND is "trainer", "accelerate" or "lightning"; rank 0 writes the state of the model to FILE.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import lightning
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from transformers import Trainer, TrainingArguments

import models
import slope_fx
from launched import DATA, GLOBAL_BATCH, OPTIMIZER, PHASES, STEPS, batch_of
from models import loss_of
from parallel import whole_state
from slope_fx.integrations import lightning as lightning_integration
from slope_fx.integrations.transformers import SlopeCallback

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
SHARE = GLOBAL_BATCH // WORLD


def trainer(model: Any) -> None:
    arguments = TrainingArguments(
        max_steps=STEPS, learning_rate=OPTIMIZER["lr"], adam_epsilon=OPTIMIZER["eps"],
        lr_scheduler_type="constant", use_cpu=True, per_device_train_batch_size=SHARE,
        train_sampling_strategy="sequential", report_to="none", save_strategy="no",
        dataloader_pin_memory=False,
    )  # fmt: skip
    callback = SlopeCallback(**PHASES)
    Trainer(model, arguments, train_dataset=DATA, callbacks=[callback]).train()


def accelerate(model: Any) -> None:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    schedule = slope_fx.Schedule(model, STEPS, **PHASES)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for step in range(STEPS):
        accelerator.backward(loss_of(wrapped, batch_of(step)))
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


class Module(lightning.LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, _: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **OPTIMIZER)


def with_lightning(model: Any) -> None:
    fit = lightning.Trainer(
        accelerator="cpu", devices=WORLD, strategy="ddp", max_steps=STEPS, logger=False,
        enable_checkpointing=False, gradient_clip_val=1.0, use_distributed_sampler=False,
        callbacks=[lightning_integration.SlopeCallback(**PHASES)],
    )  # fmt: skip
    # Lightning's own sampler shuffles.
    sampler = DistributedSampler(DATA, WORLD, int(os.environ["RANK"]), shuffle=False)
    fit.fit(Module(model), DataLoader(DATA, batch_size=SHARE, sampler=sampler))


KINDS: dict[str, Callable[[Any], None]] = {
    "trainer": trainer, "accelerate": accelerate, "lightning": with_lightning,
}  # fmt: skip


def main(kind: str, file: str) -> None:
    torch.manual_seed(0)
    model = slope_fx.compile(models.llama(), adapter_rank=4)
    KINDS[kind](model)
    state = whole_state(model)
    if os.environ.get("RANK", "0") == "0":
        torch.save(state, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
