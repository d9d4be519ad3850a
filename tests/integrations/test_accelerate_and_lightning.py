"""Trainers that know nothing of slope_fx give, saved and resumed, what a plain loop gives."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as rates

import slope_fx
from training_runs import PARTS, STEPS, X, copied, error, net, sparse_of


def training():
    """All that a run is made of: two micro-batches a step, clipping, a cosine, the schedule."""
    model, schedule = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, schedule, optimizer, rates.CosineAnnealingLR(optimizer, STEPS)


@pytest.fixture(scope="module")
def plain():
    """What the trainers' losses and weights are held against, by dtype: those of a plain loop."""

    def run(dtype):
        torch._dynamo.reset()
        model, schedule, optimizer, rate = training()
        losses = []
        for step in range(STEPS):
            for x in PARTS[2 * step : 2 * step + 2]:
                with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                    loss = error(model, x)
                (loss / 2).backward()
                losses.append(loss.item())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            schedule.step()
        return losses, copied(model)

    return {"no": run(torch.float32), "bf16": run(torch.bfloat16)}


def assert_same(model, losses, plain, first=0):
    want, state = plain
    assert losses == want[2 * first :]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def accelerated(precision):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    it = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model, schedule, *rest = training()
    loader = torch.utils.data.DataLoader(PARTS[: 2 * STEPS], batch_size=None)
    it.register_for_checkpointing(schedule)
    model, *rest = it.prepare(model, *rest)
    return it, model, schedule, *rest, loader


def accelerate_steps(run, first, last):
    it, model, schedule, optimizer, rate, loader = run
    losses = []
    for x in list(loader)[2 * first : 2 * last]:
        with it.accumulate(model), it.autocast():
            loss = error(model, x)
            it.backward(loss)
            if it.sync_gradients:
                it.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            if it.sync_gradients:
                schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("stop", "precision"), [(2, "no"), (6, "bf16")])
def test_accelerate_saves_and_resumes(tmp_path, plain, stop, precision):
    """Before and after, bit for bit what the plain loop gives; ``explain`` knows the model."""
    first = accelerated(precision)
    losses = accelerate_steps(first, 0, stop)
    first[0].save_state(tmp_path)
    second = accelerated(precision)
    second[0].load_state(tmp_path)
    losses += accelerate_steps(second, stop, STEPS)
    it, model, schedule, *_ = second
    assert schedule.last_step == STEPS
    inner = it.unwrap_model(model, keep_fp32_wrapper=False)
    want = plain[precision]
    if precision == "bf16":  # accelerate casts outputs back to fp32, which a plain loop doesn't
        whole = accelerated(precision)
        want = accelerate_steps(whole, 0, STEPS), copied(whole[1])
    assert_same(inner, losses, want)
    assert "are sparse" in str(slope_fx.explain(inner))
    it.save_model(model, tmp_path / "model")
    load = pytest.importorskip("safetensors.torch").load_file
    other, _ = net()
    other.load_state_dict(load(tmp_path / "model" / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(X), inner(X))


def lightning_fit(precision, checkpoints, others=(), **more):
    """Two micro-batches an epoch, so that Lightning may begin each again where it resumes."""
    lightning = pytest.importorskip("lightning")
    model, _, optimizer, rate = training()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, x, _):
            loss = error(self.model, x)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return [optimizer], [{"scheduler": rate, "interval": "step"}]

        def train_dataloader(self):
            epoch = self.trainer.current_epoch
            return torch.utils.data.DataLoader(PARTS[2 * epoch : 2 * epoch + 2], batch_size=None)

    from slope_fx.integrations.lightning import SlopeCallback

    slope = SlopeCallback(adapter_start=0.5, backward_mask_interval=3)
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS, logger=False, precision=precision,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
        gradient_clip_val=1.0, reload_dataloaders_every_n_epochs=1,
        callbacks=[*others, slope, lightning.pytorch.callbacks.ModelCheckpoint(**checkpoints)],
    )  # fmt: skip
    trainer.fit(module, **more)
    return module, slope.schedules[0]


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize(("stop", "precision"), [(2, "no"), (6, "bf16")])
def test_lightning_saves_and_resumes(tmp_path, plain, stop, precision):
    mixed = {"no": "32-true", "bf16": "bf16-mixed"}[precision]
    checkpoints = {
        "dirpath": tmp_path, "filename": "{step}", "every_n_train_steps": stop, "save_top_k": -1,
    }  # fmt: skip
    module, schedule = lightning_fit(mixed, checkpoints)
    assert_same(module.model, module.losses, plain[precision])
    assert (schedule.last_step, schedule.phase) == (STEPS, "adapter")
    saved = tmp_path / f"step={stop}.ckpt"
    module, schedule = lightning_fit(mixed, checkpoints, ckpt_path=saved, weights_only=True)
    assert schedule.last_step == STEPS
    assert_same(module.model, module.losses, plain[precision], first=stop)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("name", ["WeightAveraging", "StochasticWeightAveraging"])
def test_an_average_that_lightning_puts_back_has_masks(tmp_path, name):
    callbacks = pytest.importorskip("lightning").pytorch.callbacks
    more = {"swa_lrs": 1e-3, "swa_epoch_start": 2} if name.startswith("S") else {}
    checkpoints = {"dirpath": tmp_path, "save_top_k": 0}
    module, _ = lightning_fit("32-true", checkpoints, [getattr(callbacks, name)(**more)])
    for weight in sparse_of(module.model):
        assert not weight.masks_problem()
    error(module.model).backward()


def test_what_lightning_cannot_do_is_refused(tmp_path):
    lightning = pytest.importorskip("lightning")
    from slope_fx.integrations.lightning import SlopeCallback

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, x, _):
            return error(self.model, x)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-2)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(PARTS[:2], batch_size=None)

    def fit(model, **more):
        arguments = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False,
                     "enable_checkpointing": False, "enable_model_summary": False}  # fmt: skip
        trainer = lightning.Trainer(**arguments, **more, callbacks=[SlopeCallback()])
        trainer.fit(Module(model))

    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, max_epochs=1, callbacks=[SlopeCallback()],
    )  # fmt: skip
    module = Module(net()[0])
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 2
    with pytest.raises(slope_fx.errors.StateError, match="second fit"):
        trainer.fit(module)
    with pytest.raises(slope_fx.errors.ArgumentError, match=r"self\.model = slope_fx\.compile"):
        slope_fx.compile(Module(nn.Linear(8, 8)), backend="eager")
    with pytest.raises(slope_fx.errors.StateError, match="holds no model"):
        fit(nn.Linear(32, 8), max_steps=2)
    with pytest.raises(slope_fx.errors.ArgumentError, match="has no end"):
        fit(net()[0], max_epochs=-1)
