"""Activation checkpointing by torch's wrapper: in a sharded model, and of a model with a cache."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

import slope_fx
from models import TRANSFORMERS, batch, loss_of


def train(model, steps=6):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = slope_fx.Schedule(model, steps, 0.5, backward_mask_interval=2)
    losses = []
    for step in range(steps):
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def checkpointed(order, backend="aot_eager"):
    torch.manual_seed(0)
    model = slope_fx.compile(
        TRANSFORMERS["gpt2"](), backend=backend, adapter_rank=4, on_fallback="error"
    )
    blocks = model.transformer.h
    for i, block in enumerate(blocks):
        if order == "wrap first":
            block = checkpoint_wrapper(block)
        fully_shard(block)
        blocks[i] = checkpoint_wrapper(block) if order == "shard first" else block
    fully_shard(model)
    return train(model)


@pytest.mark.full
def test_activation_checkpointing(ranks):
    """checkpoint_wrapper before and after fully_shard, in both phases.

    Wrappers and shards can't be in one graph. So the default on ranks is a graph for each block,
    although one graph is less code for two blocks.
    """
    expected = ranks.run(2, checkpointed, "none")[0]
    for order in ("wrap first", "shard first"):
        for losses in ranks.run(2, checkpointed, order):
            assert losses == pytest.approx(expected, abs=1e-6)


def test_one_graph_with_a_cache():
    """The whole model as one graph, which would write to its cache within the checkpoint."""
    model = TRANSFORMERS["gpt2"]()
    assert model.config.use_cache
    slope_fx.compile(model, backend="aot_eager", region="model", on_fallback="error")
    loss = loss_of(model, batch())
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    blocks = model.transformer.h
    for i, block in enumerate(blocks):
        blocks[i] = checkpoint_wrapper(block)
    loss_of(model, batch()).backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, gradients, again))
    assert len(gradients) == len(again)
