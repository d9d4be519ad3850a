"""The Trainer of transformers, driven by SlopeCallback: as users write it."""

import json

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import models
import slope_fx
from models import batch
from slope_fx.integrations.transformers import SlopeCallback

STEPS = 8
ROWS = [{"input_ids": row, "labels": row} for row in batch(0, 64)]


def compiled(kind="gpt2", rank=4, sparsity="2:4"):
    torch.manual_seed(0)
    model = models.TRANSFORMERS[kind]()
    return slope_fx.compile(
        model, sparsity, adapter_rank=rank, backend="eager", on_fallback="error"
    )


def trainer_of(model, folder, callbacks=None, optimizers=(None, None), **more):
    arguments = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "use_cpu": True, "report_to": "none", "save_steps": 2,
        "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False, **more,
    }  # fmt: skip
    slope = SlopeCallback(adapter_start=0.5, backward_mask_interval=3)
    return Trainer(
        model, TrainingArguments(**arguments), train_dataset=ROWS, eval_dataset=ROWS[:4],
        callbacks=[slope] if callbacks is None else callbacks, optimizers=optimizers,
    )  # fmt: skip


class StopAt(TrainerCallback):
    """An interruption."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def assert_same_model(got, want):
    for name, value in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name


EVERYTHING = {
    "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "bf16": True,
    "gradient_checkpointing": True, "save_total_limit": 2, "eval_strategy": "steps",
    "eval_steps": 2, "load_best_model_at_end": True, "warmup_steps": 2,
}  # fmt: skip


@pytest.mark.full
def test_resumed_in_either_phase_equals_uninterrupted(tmp_path):
    """Stopped in the sparse phase, resumed, stopped in the adapter phase, and resumed."""
    more = EVERYTHING
    whole = trainer_of(compiled(), tmp_path / "whole", **more)
    whole.train()
    parts = tmp_path / "parts"
    for stop in (2, 6):
        slope = SlopeCallback(adapter_start=0.5, backward_mask_interval=3)
        interrupted = trainer_of(compiled(), parts, [slope, StopAt(stop)], **more)
        interrupted.train(resume_from_checkpoint=stop > 2)
        assert slope.schedule.last_step == stop
    resumed = trainer_of(compiled(), parts, **more)
    resumed.train(resume_from_checkpoint=True)
    assert_same_model(resumed.model, whole.model)

    history = [entry for entry in resumed.state.log_history if "loss" in entry]
    assert [entry["slope/adapter_phase"] for entry in history] == [0.0] * 3 + [1.0] * 5
    weights = slope_fx.sparse_weights(resumed.model).values()
    zeros = sum(int((~w.forward_mask()).sum()) for w in weights)
    total = sum(r.shape[0] * r.shape[1] for r in slope_fx.explain(resumed.model).linears)
    assert history[-1]["slope/sparsity"] == pytest.approx(zeros / total)
    assert len(list(parts.glob("checkpoint-*"))) <= 3  # the best, and two


@pytest.mark.full
def test_resumed_in_a_warm_up_of_the_adapters_equals_uninterrupted(tmp_path):
    """The Trainer wraps the optimizer, and sets its rates between steps."""

    def run(folder, warmup, stop=STEPS, resume=False):
        model = compiled()
        groups = slope_fx.param_groups(model, 1e-2, adapter_lr=4e-2, adapter_warmup=warmup)
        slope = SlopeCallback(adapter_start=0.5, backward_mask_interval=3)
        trainer = trainer_of(
            model, tmp_path / folder, [slope, StopAt(stop)],
            optimizers=(torch.optim.AdamW(groups), None),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole", 3)
    assert [g["adapter_steps"] for g in whole.optimizer.param_groups if "adapter_steps" in g] == [4]
    run("parts", 3, stop=6)
    assert_same_model(run("parts", 3, resume=True).model, whole.model)
    with pytest.raises(AssertionError, match="weight"):
        assert_same_model(run("none", 0).model, whole.model)


def test_a_checkpoint_of_the_trainer_is_one_of_slope_fx(tmp_path):
    trainer = trainer_of(compiled("llama"), tmp_path)
    trainer.train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    report = slope_fx.checkpoints.verify(folder)
    assert report.adapters_active == report.adapters > 0
    loaded = slope_fx.load_pretrained(folder, backend="eager")
    ids = batch(7)
    with torch.no_grad():
        trainer.model.eval()
        assert torch.equal(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_a_finished_run_that_is_resumed_ends(tmp_path):
    """As a restart script does it."""
    trainer_of(compiled(), tmp_path).train()
    trainer_of(compiled(), tmp_path).train(resume_from_checkpoint=True)


def test_what_cannot_go_on_is_refused(tmp_path):
    with pytest.raises(slope_fx.errors.ArgumentError, match="torch_compile=True"):
        trainer_of(compiled(), tmp_path, torch_compile=True)
    with pytest.raises(slope_fx.errors.StateError):
        trainer_of(models.gpt2(), tmp_path).train()

    slope = SlopeCallback(adapter_start=0.5, backward_mask_interval=3)
    trainer_of(compiled(), tmp_path, [slope, StopAt(2)]).train()
    with pytest.raises(slope_fx.errors.StateError, match="adapter_step"):
        trainer_of(compiled(), tmp_path, [SlopeCallback(0.9, 3)]).train(resume_from_checkpoint=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer_of(compiled(sparsity="2:8"), tmp_path).train(resume_from_checkpoint=True)
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    told = json.loads(state.read_text())
    del told["stateful_callbacks"]["SlopeCallback"]
    state.write_text(json.dumps(told))
    with pytest.raises(slope_fx.errors.StateError, match="without a SlopeCallback"):
        trainer_of(compiled(), tmp_path).train(resume_from_checkpoint=True)


def test_a_dense_checkpoint_is_not_resumed_from_in_silence(tmp_path):
    """The Trainer loads with strict=False, and would leave every sparse weight as it was."""
    dense = trainer_of(models.gpt2(), tmp_path, [StopAt(2)])
    dense.train()
    with pytest.raises(RuntimeError, match="dense"):
        trainer_of(compiled(), tmp_path).train(resume_from_checkpoint=True)
