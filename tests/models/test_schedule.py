import json
import logging
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slope_fx
from models import Plain
from slope_fx import ops

X = torch.randn(3, 8)


def compiled(rank=2):
    return slope_fx.compile(Plain(), adapter_rank=rank, example_inputs=X, backend=None)


MODEL = compiled()


@given(st.integers(1, 400), st.floats(0, 1))
def test_the_adapter_phase_is_the_last_part_of_the_run(total, start):
    schedule = slope_fx.Schedule(MODEL, total, adapter_start=start, backward_mask_interval=None)
    phases = [schedule.phase]
    for _ in range(total):
        schedule.step()
        active = {w.adapter_active for w in slope_fx.sparse_weights(MODEL).values()}
        assert active == {schedule.phase == "adapter"}
        phases.append(schedule.phase)
    with_adapters = phases[:-1].count("adapter")  # the phase each optimizer step is taken in
    assert phases == sorted(phases, reverse=True)
    assert with_adapters == total - math.floor(start * total + 1e-9)
    assert start == 1 or with_adapters >= 1


def test_the_papers_last_percent():
    schedule = slope_fx.Schedule(MODEL, 10_000)
    assert schedule.adapter_step == 9_900
    assert slope_fx.Schedule(MODEL, 100).adapter_step == 99


@pytest.mark.parametrize("interval", [1, 3, None])
def test_backward_masks_are_refreshed_at_the_interval_and_no_other_time(interval):
    model = compiled()
    schedule = slope_fx.Schedule(model, 7, backward_mask_interval=interval)
    for step in range(1, 8):
        before = {n: w.backward_mask() for n, w in slope_fx.sparse_weights(model).items()}
        for weight in slope_fx.sparse_weights(model).values():
            weight.values.data.normal_()
        schedule.step()
        for name, weight in slope_fx.sparse_weights(model).items():
            fresh = ops.backward_mask(weight.values, weight.forward_bits, 2, 4)
            due = interval is not None and step % interval == 0
            assert torch.equal(weight.backward_bits, fresh) == due
            assert due or torch.equal(weight.backward_mask(), before[name])
            assert not (weight.backward_mask() & ~weight.forward_mask()).any()


def test_state_is_plain_numbers_and_resumes():
    model = compiled()
    schedule = slope_fx.Schedule(model, 10, adapter_start=0.5)
    for _ in range(6):
        schedule.step()
    state = json.loads(json.dumps(schedule.state_dict()))
    other = compiled()
    resumed = slope_fx.Schedule(other, 10, adapter_start=0.5)
    assert resumed.phase == "sparse"
    resumed.load_state_dict(state)
    assert (resumed.phase, resumed.last_step) == ("adapter", 6)
    assert all(w.adapter_active for w in slope_fx.sparse_weights(other).values())
    for _ in range(4):
        resumed.step()
    with pytest.raises(slope_fx.errors.StateError, match="total_steps=10"):
        resumed.step()


OTHER_LENGTH = {
    "last_step": 3, "total_steps": 11, "adapter_step": 5, "backward_mask_interval": 100
}  # fmt: skip
OTHER_START = {**OTHER_LENGTH, "total_steps": 10, "adapter_step": 6}


@pytest.mark.parametrize(
    "state",
    [
        {},
        None,
        OTHER_LENGTH,
        {"last_step": 11, "total_steps": 10, "adapter_step": 5, "backward_mask_interval": 100},
        OTHER_START,
        {"last_step": None, "total_steps": 10, "adapter_step": 5, "backward_mask_interval": 100},
    ],
)
def test_states_that_do_not_fit(state):
    schedule = slope_fx.Schedule(compiled(), 10, adapter_start=0.5)
    of_another_run = state in (OTHER_LENGTH, OTHER_START)
    error = slope_fx.errors.StateError if of_another_run else slope_fx.errors.ArgumentError
    with pytest.raises(error, match="state"):
        schedule.load_state_dict(state)
    assert schedule.last_step == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"total_steps": 0}, "total_steps=0"),
        ({"total_steps": -1}, "total_steps=-1"),
        ({"total_steps": 2.5}, "total_steps=2.5"),
        ({"total_steps": True}, "total_steps=True"),
        ({"total_steps": 9, "adapter_start": 1.1}, "adapter_start=1.1"),
        ({"total_steps": 9, "adapter_start": -0.1}, "adapter_start=-0.1"),
        ({"total_steps": 9, "adapter_start": float("nan")}, "adapter_start=nan"),
        ({"total_steps": 9, "adapter_start": "0.9"}, "adapter_start='0.9'"),
        ({"total_steps": 9, "backward_mask_interval": 0}, "backward_mask_interval=0"),
        ({"total_steps": 9, "backward_mask_interval": 1.5}, "backward_mask_interval=1.5"),
    ],
)
def test_impossible_steps(arguments, words):
    with pytest.raises(slope_fx.errors.ArgumentError, match=words):
        slope_fx.Schedule(MODEL, **arguments)


def test_a_model_that_is_not_compiled():
    with pytest.raises(slope_fx.errors.StateError):
        slope_fx.Schedule(Plain(), 10)


def test_without_adapters_there_is_one_phase():
    model = compiled(rank=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = slope_fx.Schedule(model, 2)
    for _ in range(2):
        schedule.step()
        assert schedule.phase == "sparse"
    with pytest.warns(slope_fx.errors.ArgumentWarning, match=r"adapter_start=0.5 has no effect"):
        slope_fx.Schedule(model, 2, adapter_start=0.5)


def test_loading_weights_does_not_switch_the_phase():
    """In whatever order weights and schedule are loaded; B may still be zero."""
    model = compiled()
    schedule = slope_fx.Schedule(model, 10, adapter_start=0.5)
    for _ in range(5):
        schedule.step()
    weights, state = model.state_dict(), schedule.state_dict()
    other = compiled()
    resumed = slope_fx.Schedule(other, 10, adapter_start=0.5)
    resumed.load_state_dict(state)
    other.load_state_dict(weights)
    assert all(w.adapter_active for w in slope_fx.sparse_weights(other).values())
    slope_fx.Schedule(other, 10, adapter_start=0.5)  # another one says sparse, for now
    resumed.step()
    assert all(w.adapter_active for w in slope_fx.sparse_weights(other).values())


def test_starting_over_with_trained_adapters_is_told():
    model = compiled()
    model.w_in_sparse.lora_B.data.fill_(1)
    schedule = slope_fx.Schedule(model, 10)
    with pytest.warns(slope_fx.errors.TrainingWarning, match="trained already"):
        schedule.step()
    resumed = slope_fx.Schedule(model, 10)
    resumed.load_state_dict({**schedule.state_dict(), "last_step": 9})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.step()


def test_phases_and_refreshes_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="slope_fx"):
        schedule = slope_fx.Schedule(compiled(), 2, adapter_start=0.5, backward_mask_interval=2)
        schedule.step()
        schedule.step()
    text = caplog.text
    assert "step 0: sparse phase" in text
    assert "step 1: adapter phase" in text
    assert "step 2: backward masks refreshed" in text
