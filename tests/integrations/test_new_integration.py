"""An integration of one's own, by the recipe in CONTRIBUTING: a loop with checkpoints."""

import copy

import pytest
import torch

import models
import slope_fx
from models import batch, loss_of


class Loop:
    """A library's training loop, in small: hooks, a step count, checkpoints."""

    def __init__(self, model, steps, callback):
        self.model, self.steps, self.callback = model, steps, callback
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-3
        )
        self.done = 0

    def fit(self, until=None):
        self.callback.begins(self)
        while self.done < (until or self.steps):
            loss_of(self.model, batch(self.done)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1
            self.callback.stepped()

    def save(self):
        return copy.deepcopy({
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "done": self.done, "callback": self.callback.state_dict(),
        })  # fmt: skip

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]
        self.callback.load_state_dict(state["callback"])


class SlopeHook:
    """The integration: a Schedule of the loop's own steps, saved with its checkpoints."""

    def __init__(self):
        self.saved = None

    def begins(self, loop):
        self.schedule = slope_fx.Schedule(loop.model, loop.steps, 0.5, 2)
        if self.saved is not None:
            self.schedule.load_state_dict(self.saved)
        elif loop.done:
            raise slope_fx.errors.StateError("the run is resumed without its Schedule")

    def stepped(self):
        self.schedule.step()

    def state_dict(self):
        return self.schedule.state_dict()

    def load_state_dict(self, state):
        self.saved = state


def loop():
    torch.manual_seed(0)
    model = slope_fx.compile(models.gpt2(), adapter_rank=2, backend="aot_eager")
    return Loop(model, 6, SlopeHook())


@pytest.mark.parametrize(
    "stop", [pytest.param(2, id="sparse", marks=pytest.mark.full), pytest.param(4, id="adapter")]
)
def test_stopped_and_resumed_bit_for_bit(stop):
    whole = loop()
    whole.fit()
    first, second = loop(), loop()
    first.fit(until=stop)
    second.load(first.save())
    second.fit()
    assert second.callback.schedule.phase == "adapter"
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_resumed_without_the_schedule_is_refused():
    first = loop()
    first.fit(until=2)
    first.callback.saved = None
    with pytest.raises(slope_fx.errors.StateError):
        first.fit()
