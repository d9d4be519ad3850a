"""The checkpoint that several tests load from."""

import pytest
import torch

import slope_fx
from checkpoint_cases import trained


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and its checkpoint, not to be changed."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    model, parts = trained()
    slope_fx.save_pretrained(model, path, training=parts, max_shard_size=40_000)
    return model, path
