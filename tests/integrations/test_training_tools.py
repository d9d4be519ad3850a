"""Training tools that know nothing of slope_fx: optimizers, loops, trainers; in both phases."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as rates
from torch.optim import swa_utils

import slope_fx
from slope_fx.sparse.weight import mask_problem

STEPS, HALF = 8, 4
X = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
PARTS = torch.randn(4 * STEPS, 4, 32, generator=torch.Generator().manual_seed(1))


def scheduled(model, **more):
    """Compiled; the adapter phase begins half-way, and masks change at steps 3 and 6."""
    slope_fx.compile(model, "2:4", adapter_rank=4, backend="aot_eager", on_fallback="error", **more)
    return model, slope_fx.Schedule(model, STEPS, adapter_start=0.5, backward_mask_interval=3)


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in [(32, 64), (64, 128), (128, 64), (64, 8)]]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.GELU())][:-1])
    return scheduled(model, example_inputs=X)


def error(model, x=X):
    return (model(x) - x[:, :8]).square().mean()


def copied(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def sparse_of(model):
    return slope_fx.sparse_weights(model).values()


def assert_masks_kept(model, before):
    """Forward masks as before; backward ones part of them, N:M along the other dimension."""
    for name, value in model.state_dict().items():
        assert "forward_bits" not in name or torch.equal(value, before[name]), name
    for weight in sparse_of(model):
        forward, backward = weight.forward_mask(), weight.backward_mask()
        assert not mask_problem(forward, weight.pattern)
        assert not (backward & ~forward).any()
        assert backward.view(-1, weight.m, weight.d_in).sum(1).max() <= weight.n


def assert_trained(model, start, middle):
    """Values all the way; adapters in the second phase and no earlier."""
    end = copied(model)
    assert_masks_kept(model, start)
    for name, value in end.items():
        if name.endswith("weight_values"):
            assert not torch.equal(middle[name], start[name]), name
            assert not torch.equal(value, middle[name]), name
        elif "lora_" in name:
            assert torch.equal(middle[name], start[name]), name
            assert not torch.equal(value, middle[name]), name


# --- optimizers --------------------------------------------------------------------------------


def low_rank(optimizer, model, **more):
    """As GaLore's README has it, of the parameters that train: ``weight_values``."""
    chosen = {id(weight.values): weight.values for weight in sparse_of(model)}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    options = {"rank": 4, "update_proj_gap": 3, "scale": 1.0, "proj_type": "std", **more}
    return optimizer([{"params": rest}, {"params": [*chosen.values()], **options}], lr=1e-2)


def muon(model):
    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)


def bitsandbytes(name, model):
    optim = pytest.importorskip("bitsandbytes").optim
    return getattr(optim, name)(model.parameters(), lr=1e-2)


def torchao(name, model):
    optim = pytest.importorskip("torchao.optim")
    return getattr(optim, name)(model.parameters(), lr=1e-2)


def galore(model):
    return low_rank(pytest.importorskip("galore_torch").GaLoreAdamW, model)


def apollo(model):
    optimizer = pytest.importorskip("apollo_torch").APOLLOAdamW
    return low_rank(optimizer, model, proj="random", scale_type="channel")


def schedule_free(model):
    optim = pytest.importorskip("schedulefree")
    return optim.AdamWScheduleFree(model.parameters(), lr=1e-2)


OPTIMIZERS = {  # and what shows that the state of a layer's values is what the optimizer is for
    "RAdam": (lambda m: torch.optim.RAdam(m.parameters(), lr=1e-1), None),
    "Muon": (muon, lambda s, v: s["momentum_buffer"].shape == v.shape),
    "bitsandbytes 8 bit": (
        lambda m: bitsandbytes("AdamW8bit", m),
        lambda s, v: s["state1"].dtype == torch.uint8,
    ),
    "bitsandbytes paged": (
        lambda m: bitsandbytes("PagedAdamW8bit", m),
        lambda s, v: s["state1"].dtype == torch.uint8,
    ),
    "torchao 8 bit": (
        lambda m: torchao("AdamW8bit", m),
        lambda s, v: s["exp_avg"].codes.numel() == v.numel(),
    ),
    "torchao 4 bit": (
        lambda m: torchao("AdamW4bit", m),
        lambda s, v: s["exp_avg"].codes.numel() == v.numel() // 2,
    ),
    "GaLore": (galore, lambda s, v: 4 in s["exp_avg"].shape),
    "APOLLO": (apollo, lambda s, v: 4 in s["exp_avg"].shape),
    "schedule-free": (schedule_free, lambda s, v: s["z"].shape == v.shape),
}


@pytest.mark.filterwarnings("ignore:This implementation of AdamW:FutureWarning")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_others(name):
    make, as_intended = OPTIMIZERS[name]
    model, schedule = net()
    optimizer = make(model)
    if name == "schedule-free":
        optimizer.train()
    start, losses = copied(model), []
    for step in range(STEPS):
        if step == HALF:
            middle = copied(model)
        loss = error(model)
        loss.backward()
        # torchao compiles its arithmetic by Inductor, which takes longer than all of this.
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[HALF] < losses[0]
    assert_trained(model, start, middle)
    for weight in sparse_of(model):
        state = optimizer.state[weight.values]
        assert as_intended is None or as_intended(state, weight.values)


def test_the_weights_that_low_rank_recipes_look_for_are_refused():
    """``module.weight`` is no parameter of a sparse layer, and no optimizer takes it for one."""
    model, _ = net()
    chosen = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    with pytest.raises(
        slope_fx.errors.UnsupportedError, match=r"an optimizer can't train it.*parameters"
    ):
        torch.optim.AdamW(chosen)


# --- loops -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "clip"), [(torch.bfloat16, "norm"), (torch.float16, "value")])
def test_mixed_precision_with_a_step_skipped_in_each_phase(dtype, clip):
    """The gradients aren't finite at two steps, which GradScaler leaves out."""
    model, schedule = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    start, losses, skipped = copied(model), [], []
    for step in range(STEPS):
        before = copied(model)
        if step == HALF:
            middle = before
        for _ in range(2):
            with torch.autocast("cpu", dtype=dtype):
                loss = error(model) / 2
            scaler.scale(loss * (float("inf") if step in (1, 6) else 1)).backward()
        scaler.unscale_(optimizer)
        if clip == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            nn.utils.clip_grad_value_(model.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if all(torch.equal(value, before[name]) for name, value in model.state_dict().items()):
            skipped.append(step)
        schedule.step()
        losses.append(loss.item())
    assert skipped == [1, 6]
    assert losses[-1] < losses[HALF] < losses[0]
    assert_trained(model, start, middle)


RATES = {
    "OneCycle": lambda o: rates.OneCycleLR(o, 2e-2, total_steps=STEPS + 1),
    "Plateau": lambda o: rates.ReduceLROnPlateau(o, patience=1),
    "Sequential": lambda o: rates.SequentialLR(
        o, [rates.LinearLR(o), rates.CosineAnnealingLR(o, HALF)], [HALF]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 5e-3, anneal_epochs=3),
}


@pytest.mark.parametrize("name", RATES)
def test_learning_rate_schedulers_beside_the_schedule(name):
    model, schedule = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rate, start, losses, seen = RATES[name](optimizer), copied(model), [], set()
    for step in range(STEPS):
        if step == HALF:
            middle = copied(model)
        loss = error(model)
        loss.backward()
        seen.add(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        # That a loss doesn't fall is what ReduceLROnPlateau waits for.
        rate.step(*([1.0] if name == "Plateau" else []))
        schedule.step()
        losses.append(loss.item())
    assert len(seen) > 1
    assert losses[-1] < losses[0]
    assert_trained(model, start, middle)


def ema_pytorch(model):
    module = pytest.importorskip("ema_pytorch")
    average = module.EMA(model, beta=0.5, update_after_step=-1, update_every=1, min_value=0.5)
    average.update()  # the first one copies
    return average, average.ema_model, lambda: average.update()


def averaged(**more):
    """torch's own, which takes all parameters, masks among them."""

    def make(model):
        average = swa_utils.AveragedModel(model, **more)
        average.update_parameters(model)
        return average, average.module, lambda: average.update_parameters(model)

    return make


AVERAGES = {
    "ema_pytorch": (ema_pytorch, 0.5),
    "mean": (averaged(), None),
    "EMA": (averaged(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5)), 0.5),
    "EMA, one by one": (averaged(avg_fn=swa_utils.get_ema_avg_fn(0.5), use_buffers=True), 0.5),
    "mean, foreach": (averaged(multi_avg_fn=swa_utils.get_swa_multi_avg_fn()), None),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_moving_averages_evaluate_to_what_the_averaged_values_give(name):
    """In both phases; the average's masks are N:M, and its adapters begin with the model's."""
    make, decay = AVERAGES[name]
    model, schedule = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average, inner, update = make(model)
    by_hand, start = copied(model), copied(model)
    for step in range(STEPS):
        error(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        update()
        for key, value in model.state_dict().items():
            share = 1 / (step + 2) if decay is None else 1 - decay
            lerp = value.is_floating_point()
            by_hand[key] = torch.lerp(by_hand[key], value, share) if lerp else value.clone()
    assert_masks_kept(inner, start)
    other, its_schedule = net()
    other.load_state_dict(by_hand)
    its_schedule.load_state_dict(schedule.state_dict())
    with torch.no_grad():
        got, want, last = average(X), other(X), model(X)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, last, atol=1e-3)
    inner.load_state_dict(inner.state_dict())  # what it would save can be loaded


# --- trainers ----------------------------------------------------------------------------------


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
