"""The phase of a model and of its copies: who follows whom, and who is left alone."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import slope_fx

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def compiled(**more):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    more = {"adapter_rank": 2, "backend": "eager", **more}
    return slope_fx.compile(model, example_inputs=X, **more)


def active(model):
    (only,) = {weight.adapter_active for weight in slope_fx.sparse_weights(model).values()}
    return only


def train(model, schedule, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        schedule.step()


def stored(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("road", [lambda m: m, copy.deepcopy, stored], ids=["own", "copy", "file"])
def test_an_average_follows_its_model(road):
    """Also the average of a model that is a copy itself."""
    model = road(compiled())
    average = AveragedModel(model, avg_fn=lambda old, new, count: new)
    schedule = slope_fx.Schedule(model, 8, adapter_start=0.5)
    train(model, schedule, 8)
    average.update_parameters(model)
    assert active(average.module)
    torch.testing.assert_close(average.module(X), model(X))


def test_a_copy_that_was_trained_stays_as_it_is():
    """A teacher, the best model so far: what its original does later is not its own."""
    model = compiled()
    schedule = slope_fx.Schedule(model, 4, adapter_start=0.5)
    early = schedule.state_dict()
    train(model, schedule, 4)
    teacher = copy.deepcopy(model)
    before = teacher(X).detach()
    schedule.load_state_dict(early)
    assert not active(model)
    slope_fx.Schedule(model, 100)
    assert active(teacher)
    assert torch.equal(teacher(X), before)


def test_a_snapshot_of_model_and_schedule_leaves_the_original_alone():
    model = compiled()
    schedule = slope_fx.Schedule(model, 4, adapter_start=0.5)
    other, its = copy.deepcopy((model, schedule))
    for _ in range(3):
        its.step()
    assert (active(other), its.phase) == (True, "adapter")
    assert (active(model), schedule.phase) == (False, "sparse")


def test_weights_loaded_into_a_model_are_not_its_copys():
    model = compiled()
    trained = compiled()
    train(trained, slope_fx.Schedule(trained, 2, adapter_start=0.0), 2)
    other = copy.deepcopy(model)
    model.load_state_dict(trained.state_dict())
    assert (active(model), active(other)) == (True, False)


def test_a_schedule_that_starts_over_trained_adapters_says_so():
    trained = compiled()
    train(trained, slope_fx.Schedule(trained, 2, adapter_start=0.0), 2)
    model = compiled()
    schedule = slope_fx.Schedule(model, 100)
    model.load_state_dict(trained.state_dict())
    with pytest.warns(slope_fx.errors.TrainingWarning, match="trained already"):
        train(model, schedule, 1)


@pytest.mark.parametrize("road", [copy.deepcopy, stored], ids=["copy", "file"])
def test_a_copy_without_a_schedule_is_told_of_it(road):
    model = compiled()
    slope_fx.Schedule(model, 10)
    other = road(model)
    other(X).sum().backward()
    with pytest.warns(slope_fx.errors.TrainingWarning, match="no slope_fx.Schedule was made"):
        torch.optim.SGD(other.parameters(), lr=0.1).step()


def test_a_schedule_of_a_model_whose_sparse_layers_are_gone():
    model = compiled()
    for name in slope_fx.sparse_weights(model):
        model[int(name)] = nn.Linear(16, 16)
    assert slope_fx.Schedule(model, 5).phase == "sparse"


def test_a_copy_that_failed_half_way_does_not_disturb_other_models():
    class Remembers(nn.Linear):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    model = nn.Sequential(nn.Linear(16, 16), Remembers(16, 16), nn.Linear(16, 16))
    slope_fx.compile(model, example_inputs=X, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    with pytest.raises(slope_fx.errors.UnsupportedError) as kept:
        slope_fx.densify(model)
    optimizer.step()
    assert kept.value is not None


def test_a_weight_that_others_still_use_is_no_mistake():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = nn.Linear(16, 16)
            self.dec = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
            self.dec[1].weight = self.enc.weight

        def forward(self, x):
            return self.dec(self.enc(x))

    model = Tied()
    slope_fx.compile(model.dec, example_inputs=X, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_compile_in_inference_mode_makes_a_model_that_trains():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    with torch.inference_mode():
        slope_fx.compile(model, example_inputs=X, backend="aot_eager", on_fallback="error")
    model(X).sum().backward()
    assert all(w.values.grad is not None for w in slope_fx.sparse_weights(model).values())
