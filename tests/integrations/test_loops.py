"""Loops of one's own: mixed precision, learning rate schedulers and averages, in both phases."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as rates
from torch.optim import swa_utils

from training_runs import HALF, STEPS, X, assert_masks_kept, assert_trained, copied, error, net


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
