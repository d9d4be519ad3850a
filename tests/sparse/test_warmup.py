"""The learning rate of adapters rises from their first step, under any optimizer and schedule."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, Adafactor, AdamW
from torch.optim.lr_scheduler import LambdaLR

import models
import slope_fx
from models import batch, loss_of
from slope_fx.errors import ArgumentError, ArgumentWarning

STEPS, START, WARMUP = 8, 3, 4


def compiled():
    torch.manual_seed(0)
    return slope_fx.compile(models.gpt2(), "2:4", adapter_rank=2, backend="eager")


def cosine(step):
    return 0.55 + 0.45 * math.cos(math.pi * step / STEPS)


class Run:
    """A short run. ``by_hand``: the warm-up is done between steps, as a user would without it."""

    def __init__(self, make, warmup, by_hand=False, model=None, closure=False):
        self.model, self.by_hand, self.closure = model or compiled(), by_hand, closure
        groups = slope_fx.param_groups(self.model, 1e-2, adapter_lr=3e-2, adapter_warmup=warmup)
        self.optimizer = make(groups)
        self.schedule = slope_fx.Schedule(self.model, STEPS, adapter_start=START / STEPS)
        self.rates = LambdaLR(self.optimizer, cosine)

    def train(self, first, last):
        for step in range(first, last):

            def gradients(step=step):
                self.optimizer.zero_grad()
                loss = loss_of(self.model, batch(seed=step))
                loss.backward()
                return loss

            if not self.closure:
                gradients()
            groups = [g for g in self.optimizer.param_groups if g["name"] == "adapters"]
            before = [copy.deepcopy(g["lr"]) for g in groups]
            if self.by_hand and step >= START:
                for group in groups:
                    group["lr"] = group["lr"] * min(1, (step - START + 1) / WARMUP)
            self.optimizer.step(gradients) if self.closure else self.optimizer.step()
            if self.by_hand:
                for group, rate in zip(groups, before, strict=True):
                    group["lr"] = rate
            assert [g["lr"] for g in groups] == before  # schedules see no warm-up
            self.optimizer.zero_grad()
            self.rates.step()
            self.schedule.step()
        return self

    def parts(self):
        return {"optimizer": self.optimizer, "schedule": self.schedule, "rates": self.rates}

    def equals(self, other):
        pairs = zip(self.model.parameters(), other.model.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def tensor_rates(groups):
    for group in groups:
        group["lr"] = torch.tensor(group["lr"])
    return AdamW(groups)


class Ascending(torch.optim.Optimizer):
    """An optimizer within another one, with the same groups, as of sharpness-aware training."""

    def __init__(self, groups):
        self.base = AdamW(groups)
        super().__init__(self.base.param_groups, {})
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        self.base.step()


@pytest.mark.parametrize(
    "make",
    [AdamW, *(pytest.param(m, marks=pytest.mark.full) for m in (SGD, Adafactor, tensor_rates)),
     Ascending],
)  # fmt: skip
def test_a_warm_up_equals_one_by_hand(make):
    run = Run(make, WARMUP).train(0, STEPS)
    assert run.equals(Run(make, 0, by_hand=True).train(0, STEPS))
    assert not run.equals(Run(make, 0).train(0, STEPS))


def test_gradients_that_a_closure_makes_within_the_step():
    """As Lightning's always does: the first step of the adapters has no gradients before it."""
    run = Run(AdamW, WARMUP, closure=True).train(0, STEPS)
    assert run.equals(Run(AdamW, 0, by_hand=True).train(0, STEPS))


def test_zero_redundancy_optimizer(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run = Run(lambda groups: ZeroRedundancyOptimizer(groups, AdamW), WARMUP).train(0, STEPS)
        assert run.equals(Run(AdamW, 0, by_hand=True).train(0, STEPS))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(2, marks=pytest.mark.full),
        pytest.param(START, marks=pytest.mark.full),
        START + 2,
    ],
)
def test_a_resumed_warm_up_goes_on(stop, tmp_path):
    whole = Run(AdamW, WARMUP).train(0, STEPS)
    first = Run(AdamW, WARMUP).train(0, stop)
    path = slope_fx.save_pretrained(first.model, tmp_path / "c", training=first.parts())
    second = Run(AdamW, WARMUP, model=slope_fx.load_pretrained(path, backend="eager"))
    slope_fx.load_training(path, second.parts())
    assert second.train(stop, STEPS).equals(whole)


def test_the_step_in_which_torch_makes_a_state_does_not_count():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    run = Run(AdamW, WARMUP)
    for _ in range(START):
        run.schedule.step()
    get_optimizer_state_dict(run.model, run.optimizer)
    assert [g["adapter_steps"] for g in run.optimizer.param_groups if "adapter_steps" in g] == [0]


def test_a_step_that_raises_leaves_no_rate():
    run = Run(AdamW, WARMUP).train(0, START)
    (group,) = (g for g in run.optimizer.param_groups if g["name"] == "adapters")
    rate = group["lr"]
    loss_of(run.model, batch(seed=START)).backward()

    def halt(*_):
        raise RuntimeError("halt")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AdamW, "_init_group", halt)
        with pytest.raises(RuntimeError, match="halt"):
            run.optimizer.step()
    run.optimizer.step()
    assert group["lr"] == rate
    assert (group["adapter_warmup"], group["adapter_steps"]) == (WARMUP, 2)


@pytest.mark.parametrize("wrong", [-1, 2.5, True, None])
def test_a_warm_up_is_a_number_of_steps(wrong):
    with pytest.raises(ArgumentError, match=r"adapter_warmup=.*; allowed is a whole number"):
        slope_fx.param_groups(compiled(), 1e-3, adapter_warmup=wrong)


@pytest.mark.parametrize(
    ("options", "given", "said"),
    [
        ({}, {"adapter_lr": 1e-2}, r"adapter_lr=0\.01 has no effect: the model has no adapters"),
        ({}, {"adapter_warmup": 5}, "adapter_warmup=5 has no effect"),
        ({"method": "dense"}, {"sparse_lr": 1e-2}, "sparse_lr=.* has no sparse weights that train"),
    ],
)
def test_rates_without_parameters_are_told(options, given, said):
    model = slope_fx.compile(models.gpt2(), backend="eager", **options)
    with pytest.warns(ArgumentWarning, match=said):
        slope_fx.param_groups(model, 1e-3, **given)
