"""A run that was interrupted and resumed equals one that was not, bit for bit."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
import slope_fx
from models import batch, loss_of

STEPS = 12


def start():
    torch.manual_seed(0)
    model = models.gpt2()
    slope_fx.compile(model, "2:4", adapter_rank=4, backend="aot_eager", on_fallback="error")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    schedule = slope_fx.Schedule(model, STEPS, adapter_start=0.5, backward_mask_interval=3)
    return {"model": model, "optimizer": optimizer, "rates": rates, "schedule": schedule}


def train(run, first, last):
    losses = []
    for step in range(first, last):
        loss = loss_of(run["model"], batch(seed=step))
        loss.backward()
        run["optimizer"].step()
        run["optimizer"].zero_grad()
        run["rates"].step()
        run["schedule"].step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(2, id="sparse"),
        pytest.param(6, id="switch", marks=pytest.mark.full),
        pytest.param(7, id="adapter"),
        pytest.param(11, id="end", marks=pytest.mark.full),
    ],
)
def test_interrupted_equals_uninterrupted(stop):
    whole = start()
    want = train(whole, 0, STEPS)

    first = start()
    got = train(first, 0, stop)
    buffer = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in first.items()}, buffer)
    buffer.seek(0)

    second = start()
    for name, state in torch.load(buffer, weights_only=True).items():
        second[name].load_state_dict(state)
    got += train(second, stop, STEPS)

    assert got == want
    for name, value in whole["model"].state_dict().items():
        assert torch.equal(second["model"].state_dict()[name], value), name


@pytest.mark.full
def test_killed_and_resumed(tmp_path, monkeypatch):
    """The benchmark of thirty kills, with three."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import kill_and_resume

    result = kill_and_resume.kill_and_resume(tmp_path, steps=8, kills=3, seed=1)
    assert result["identical"]
    assert result["kills_in_sparse_phase"] + result["kills_in_adapter_phase"] == 3


LOADED = """
import sys, warnings, torch, slope_fx
model = slope_fx.load_pretrained(sys.argv[1], backend="eager").train()
weight = next(iter(slope_fx.sparse_weights(model).values()))
before = weight.lora_A.detach().clone()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
ids = torch.arange(12)[None] % 32
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    model(input_ids=ids, labels=ids).loss.backward()
    for factor in (weight.lora_A, weight.lora_B):
        factor.grad = torch.zeros_like(factor)
    optimizer.step()
said = sum("no slope_fx.Schedule" in str(warning.message) for warning in told)
print(torch.equal(before, weight.lora_A), said)
"""


def test_a_model_loaded_in_another_process_keeps_its_idle_adapters(tmp_path):
    """Nothing is compiled there: what looks at optimizers' steps is there all the same."""
    model = slope_fx.compile(models.gpt2(), adapter_rank=2, backend="eager")
    path = slope_fx.save_pretrained(model, tmp_path / "c")
    command = [sys.executable, "-c", LOADED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "1"]
