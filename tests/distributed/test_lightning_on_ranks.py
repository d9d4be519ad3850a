"""Lightning on two processes: as a plain loop in one, stopped and resumed in both phases."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from launched import (
    AT_THE_ADAPTERS,
    DATA,
    GLOBAL_BATCH,
    OPTIMIZER,
    PHASES,
    RUNS,
    STEPS,
    launched,
    mean_over_ranks,
    model_of,
    plain_loop,
)
from parallel import assert_same, whole_state
from slope_fx.integrations.lightning import SlopeCallback

_plain = []


class Module(lightning.LightningModule):
    """An epoch is one step, so that Lightning may begin each again where it resumes."""

    def __init__(self, checkpointing):
        super().__init__()
        self.model, self.losses = model_of("gpt2"), []
        if checkpointing is not None:
            self.model.gradient_checkpointing_enable({"use_reentrant": checkpointing})

    def training_step(self, batch, _):
        loss = self.model(**batch).loss
        self.losses.append(loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), **OPTIMIZER)

    def train_dataloader(self):
        first = self.trainer.current_epoch * GLOBAL_BATCH
        return DataLoader(
            DATA[first : first + GLOBAL_BATCH], batch_size=GLOBAL_BATCH // self.trainer.world_size
        )


class Sharded(Module):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class Stop(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == self.step


def strategy_of(name, world):
    if name == "ddp":
        return "ddp"
    if name == "ddp, static":
        return DDPStrategy(static_graph=True)
    return ModelParallelStrategy(world, 1, save_distributed_checkpoint=name == "sharded files")


def fit(name, checkpointing, folder, first, last):
    with launched():
        world = torch.distributed.get_world_size()
        trainer = lightning.Trainer(
            accelerator="cpu", devices=world, strategy=strategy_of(name, world), max_steps=STEPS,
            logger=False, enable_progress_bar=False, enable_model_summary=False,
            gradient_clip_val=1.0, reload_dataloaders_every_n_epochs=1,
            callbacks=[
                SlopeCallback(**PHASES), Stop(last),
                ModelCheckpoint(folder, "{step}", every_n_train_steps=last, save_top_k=-1),
            ],
        )  # fmt: skip
        module = (Module if name.startswith("ddp") else Sharded)(checkpointing)
        resumed = folder / f"step={first}.ckpt" if first else None
        trainer.fit(module, ckpt_path=resumed, weights_only=False)
        return {"losses": mean_over_ranks(module.losses), "state": whole_state(module.model)}


def full(*case):
    return pytest.param(*case, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("name", "checkpointing", "worlds"),
    [
        full("ddp", None, (2, 2, 2)),
        full("ddp", None, (2, 1, 2)),
        full("ddp", False, (2, 2, 2)),
        full("ddp", True, (2, 2, 2)),
        full("ddp, static", None, (2, 2, 2)),
        full("sharded files", None, (2, 2, 2)),
        ("sharded files", None, (2, 1, 2)),
        full("sharded files", False, (2, 2, 2)),
        full("one file", None, (2, 1, 2)),
    ],
)
def test_lightning(ranks, tmp_path, name, checkpointing, worlds):
    check(ranks, tmp_path, name, checkpointing, worlds, RUNS)


@pytest.mark.full
@pytest.mark.parametrize("name", ["ddp", "sharded files", "one file"])
def test_stopped_where_the_adapters_begin(ranks, tmp_path, name):
    check(ranks, tmp_path, name, None, (2, 2), AT_THE_ADAPTERS)


def check(ranks, folder, name, checkpointing, worlds, runs):
    if not _plain:
        _plain.append(plain_loop("gpt2"))
    losses = []
    for world, (first, last) in zip(worlds, runs, strict=True):
        got = ranks.run(world, fit, name, checkpointing, folder, first, last, timeout=300)
        losses += got[0]["losses"]
    for one in got:
        assert_same({**one, "losses": losses}, _plain[0])
