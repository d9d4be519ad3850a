"""A run on several ranks is saved, stopped and resumed: the same numbers as without the stop."""

import random

import numpy
import pytest
import torch
import torch.distributed as dist

import slope_fx
from sharded_runs import STEPS, Run, differences

SMALL = 30_000
"""Bytes in a file: a model of the tests then has several files, which several ranks write."""


def interrupted(path, how, stop, again):
    """A run that stops, and what it had then and at its end; and the losses of the same, resumed.

    Args:
        again: how the resumed model is wrapped.
    """
    run = Run(how)
    run.train(0, stop)
    torch.manual_seed(100 + dist.get_rank())
    slope_fx.save_pretrained(
        run.model, path, training={**run.parts, "step": stop}, max_shard_size=SMALL
    )
    draw = torch.rand(1).item(), random.random(), numpy.random.rand()
    saved = run.tensors(), run.moments()
    want = run.train(stop, STEPS), run.tensors()

    second, rest, drawn = resumed(path, again)
    assert rest == {"step": stop}
    assert drawn == draw
    assert not differences(second.tensors(), saved[0])
    assert not differences(second.moments(), saved[1])
    got = second.train(stop, STEPS)
    assert got == want[0]
    assert not differences(second.tensors(), want[1])
    return got


def resumed(path, how):
    model = slope_fx.load_pretrained(path, backend="aot_eager", on_fallback="error").train()
    run = Run(how, model=model)
    rest = slope_fx.load_training(path, run.parts)
    return run, rest, (torch.rand(1).item(), random.random(), numpy.random.rand())


@pytest.mark.parametrize("stop", [3, 6, 9], ids=["sparse", "switch", "adapter"])
@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_resumed_equals_uninterrupted(how, stop, ranks, tmp_path):
    first, second = ranks.run(2, interrupted, tmp_path / "c", how, stop, how)
    assert first == second
    assert len(list((tmp_path / "c").glob("slope_fx-*.safetensors"))) > 2
    assert slope_fx.checkpoints.verify(tmp_path / "c").training
