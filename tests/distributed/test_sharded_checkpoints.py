"""A run on several ranks is saved, stopped and resumed: the same numbers as without the stop."""

import random

import numpy
import pytest
import torch
import torch.distributed as dist

import slope_fx
from sharded_runs import STEPS, Run, differences, received, sent

SMALL = 30_000
"""Bytes in a file: a model of the tests then has several files, which several ranks write."""
STOPS = (3, 6, 9)
"""In the sparse phase, where the adapters begin, and after."""


def draws():
    return torch.rand(1).item(), random.random(), numpy.random.rand()


def interrupted(path, how):
    """A run that is saved on its way, and runs resumed from each checkpoint."""
    run = Run(how)
    losses, saved = [], {}
    for stop, end in zip(STOPS, (*STOPS[1:], STEPS), strict=True):
        losses += run.train(len(losses), stop)
        torch.manual_seed(100 * stop + dist.get_rank())
        training = {**run.parts, "step": stop, "rank": dist.get_rank()}
        slope_fx.save_pretrained(
            run.model, f"{path}/{stop}", training=training, max_shard_size=SMALL
        )
        saved[stop] = run.tensors(), run.moments(), draws()
        losses += run.train(stop, end)
    for stop, (tensors, moments, drawn) in saved.items():
        again, rest = resumed(f"{path}/{stop}", how)
        assert draws() == drawn
        assert rest == {"step": stop, "rank": dist.get_rank()}
        assert not differences(again.tensors(), tensors)
        assert not differences(again.moments(), moments)
        assert again.train(stop, STEPS) == losses[stop:]
        assert not differences(again.tensors(), run.tensors())
    return losses, drawn, sent(run.tensors())


def resumed(path, how):
    model = slope_fx.load_pretrained(path, backend="eager", on_fallback="error").train()
    run = Run(how, model=model)
    return run, slope_fx.load_training(path, run.parts)


@pytest.mark.parametrize("how", ["fsdp", pytest.param("ddp", marks=pytest.mark.full)])
def test_resumed_equals_uninterrupted(how, ranks, tmp_path):
    (losses, one, end), (same, other, _) = ranks.run(2, interrupted, tmp_path, how)
    assert losses == same
    assert one != other  # the random states are each rank's own
    for stop in STOPS:
        assert len(list((tmp_path / f"{stop}").glob("model-*.safetensors"))) > 2
        assert slope_fx.checkpoints.verify(tmp_path / f"{stop}").training
    # One process goes on with it, and a third rank keeps its random states.
    for got in ranks.run(1, elsewhere, tmp_path, "bare", 2) + ranks.run(
        3, elsewhere, tmp_path, how, 2
    ):
        assert got[0] == pytest.approx(losses[9:], rel=1e-5)
        for name, tensor in received(got[1]).items():
            want = received(end)[name]
            if tensor.dtype == torch.uint8:
                assert torch.equal(tensor, want), name
            else:
                torch.testing.assert_close(tensor, want, atol=1e-4, rtol=1e-4, msg=name)


def elsewhere(path, how, saved):
    """The last checkpoint on another number of ranks."""
    import warnings

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run, rest = resumed(f"{path}/9", how)
    told = [str(w.message) for w in told if w.category is slope_fx.errors.TrainingWarning]
    rank = dist.get_rank()
    assert any("'rank' was saved by 2 ranks" in text for text in told)
    assert any("keeps those that it has now" in text for text in told) == (rank >= saved)
    assert rest["rank"] == (rank if rank < saved else 0)
    return run.train(9, STEPS), sent(run.tensors())
