"""The Trainer of transformers and Accelerate on two processes: as a plain loop in one."""

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import slope_fx
from launched import (
    AT_THE_ADAPTERS,
    DATA,
    GLOBAL_BATCH,
    OPTIMIZER,
    PHASES,
    RUNS,
    STEPS,
    StopAt,
    as_on_gpus,
    batch_of,
    launched,
    mean_over_ranks,
    model_of,
    plain_loop,
)
from models import loss_of
from parallel import assert_same, whole_state
from slope_fx.integrations.transformers import SlopeCallback

_plain = {}


def plain(name):
    if name not in _plain:
        _plain[name] = plain_loop(name)
    return _plain[name]


class Recorder(Trainer):
    losses: list

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp": FSDPModule}


def trainer_run(name, strategy, folder, first, last, more):
    """The steps from first to last of the run, by a new Trainer that resumes at ``first``."""
    with launched():
        arguments = TrainingArguments(
            str(folder), max_steps=STEPS, learning_rate=OPTIMIZER["lr"],
            adam_epsilon=OPTIMIZER["eps"], lr_scheduler_type="constant", use_cpu=True,
            per_device_train_batch_size=GLOBAL_BATCH // torch.distributed.get_world_size(),
            train_sampling_strategy="sequential", report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **more,
        )  # fmt: skip
        if strategy == "fsdp":
            as_on_gpus()
        trainer = Recorder(
            model_of(name), arguments, train_dataset=DATA,
            callbacks=[SlopeCallback(**PHASES), StopAt(last)],
        )  # fmt: skip
        trainer.losses = []
        trainer.train(resume_from_checkpoint=first > 0)
        assert isinstance(trainer.model_wrapped, WRAPPERS[strategy]), type(trainer.model_wrapped)
        return {"losses": mean_over_ranks(trainer.losses), "state": whole_state(trainer.model)}


FSDP = {"fsdp": True, "fsdp_config": {"fsdp_version": 2}}

TRAINERS = {
    "DDP": ("ddp", {}),
    "DDP, checkpointing": (
        "ddp", {"gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    "DDP, reentrant checkpointing": (
        "ddp", {"gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "FSDP2": ("fsdp", FSDP),
    "FSDP2, sharded": (
        "fsdp", {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
    ),
    "FSDP2, checkpointing": (
        "fsdp", {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}},
    ),
}  # fmt: skip


def check(ranks, worlds, want, function, *args, runs=RUNS):
    """Run the parts, each on a number of ranks; compare all losses and the last weights."""
    losses = []
    for world, (first, last) in zip(worlds, runs, strict=True):
        got = ranks.run(world, function, *args[:-1], first, last, args[-1], timeout=300)
        losses += got[0]["losses"]
    for one in got:
        assert_same({**one, "losses": losses}, want)


def cases(ways, in_ci):
    """Each way at the same number of processes and at another; CI runs one of them."""
    return [
        pytest.param(way, worlds, marks=() if (way, worlds) == in_ci else pytest.mark.full)
        for way in ways
        for worlds in ((2, 2, 2), (2, 1, 2))
    ]


@pytest.mark.parametrize(("way", "worlds"), cases(TRAINERS, ("FSDP2", (2, 1, 2))))
def test_trainer(ranks, tmp_path, way, worlds):
    strategy, more = TRAINERS[way]
    check(ranks, worlds, plain("gpt2"), trainer_run, "gpt2", strategy, tmp_path, more)
    if way == "FSDP2":  # its default checkpoint is whole
        loaded = slope_fx.load_pretrained(tmp_path / f"checkpoint-{STEPS}", backend=None)
        end = {"losses": [0.0], "state": loaded.state_dict()}
        assert_same(end, {**plain("gpt2"), "losses": [0.0]})


@pytest.mark.full
@pytest.mark.parametrize("way", TRAINERS)
def test_trainer_stopped_where_the_adapters_begin(ranks, tmp_path, way):
    strategy, more = TRAINERS[way]
    args = plain("gpt2"), trainer_run, "gpt2", strategy, tmp_path, more
    check(ranks, (2, 2), *args, runs=AT_THE_ADAPTERS)


def accelerate_run(name, strategy, folder, first, last, more):
    """As the recipe: ``prepare``, ``accumulate``, ``save_state``."""
    with launched():
        plugin, more = None, dict(more)
        parts, checkpointing = more.pop("accumulation", 1), more.pop("checkpointing", False)
        if strategy == "fsdp":
            PartialState(cpu=True)
            as_on_gpus()
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **more
            )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=parts)
        model = model_of(name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
        schedule = slope_fx.Schedule(model, STEPS, **PHASES)
        accelerator.register_for_checkpointing(schedule)
        model, optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(model, WRAPPERS[strategy]), type(model)
        if first:
            accelerator.load_state(folder)
        losses = []
        for step in range(first, last):
            mean = 0.0
            for ids in batch_of(step).chunk(parts):
                with accelerator.accumulate(model):
                    loss = loss_of(model, ids)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    if accelerator.sync_gradients:
                        schedule.step()
                mean += loss.detach() / parts
            losses.append(mean)
        accelerator.save_state(folder)
        state = whole_state(accelerator.unwrap_model(model))
        return {"losses": mean_over_ranks(losses), "state": state}


ACCELERATE = {
    "DDP": ("ddp", {}),
    "DDP, accumulation": ("ddp", {"accumulation": 2}),
    "DDP, checkpointing": ("ddp", {"checkpointing": True}),
    "FSDP2": ("fsdp", {}),
    "FSDP2, accumulation": ("fsdp", {"accumulation": 2}),
    "FSDP2, whole state": ("fsdp", {"state_dict_type": "FULL_STATE_DICT"}),
    "FSDP2, from rank 0": ("fsdp", {"cpu_ram_efficient_loading": True}),
    "FSDP2, checkpointing": ("fsdp", {"activation_checkpointing": True}),
}


@pytest.mark.full
def test_idle_adapters_start_with_fresh_moments_whatever_was_loaded(ranks, tmp_path):
    """Trained adapters look active to the load in the sparse phase."""
    check(ranks, (2, 2, 2), plain("gpt2+"), trainer_run, "gpt2+", "fsdp", tmp_path, FSDP)


@pytest.mark.parametrize(("way", "worlds"), cases(ACCELERATE, ("DDP, accumulation", (2, 1, 2))))
def test_accelerate(ranks, tmp_path, way, worlds):
    strategy, more = ACCELERATE[way]
    check(ranks, worlds, plain("llama"), accelerate_run, "llama", strategy, tmp_path, more)


@pytest.mark.full
@pytest.mark.parametrize("way", ["DDP", "FSDP2", "FSDP2, whole state"])
def test_accelerate_stopped_where_the_adapters_begin(ranks, tmp_path, way):
    strategy, more = ACCELERATE[way]
    args = plain("llama"), accelerate_run, "llama", strategy, tmp_path, more
    check(ranks, (2, 2), *args, runs=AT_THE_ADAPTERS)
