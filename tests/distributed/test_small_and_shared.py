"""Weights with fewer rows than ranks, weights that modules share, and warnings without traffic."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import models
import slope_fx
from parallel import compiled
from slope_fx.errors import TrainingWarning
from slope_fx.sparse.shards import whole
from ways import fsdp_blocks

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """Its second weight has 4 rows: 2 on each of two ranks, and none on the third."""

    def __init__(self):
        super().__init__()
        self.first, self.small, self.last = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x):
        return self.last(self.small(self.first(x)))


def small(device="cpu"):
    with torch.device(device):
        model = Small()
    options = {"skip_head": False, "adapter_rank": 2, "backend": None}
    return slope_fx.compile(model, example_inputs=X.to(device), **options)


def filled_in_place():
    torch.manual_seed(1)
    source = small()
    model = fully_shard(small("meta"))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), source.parameters(), strict=True):
            mine.copy_(torch.distributed.tensor.distribute_tensor(
                theirs.data, mine.device_mesh, mine.placements
            ))  # fmt: skip
    weight = slope_fx.sparse_weights(model)["small"]
    rows = len(weight.values.to_local())
    mask = weight.forward_mask()
    generator = torch.Generator().manual_seed(5)
    dense = torch.randn(4, 16, generator=generator)
    weight.write_(dense)  # the weight has content, so its masks stay
    assert torch.equal(weight.forward_mask(), mask)
    assert torch.equal(weight.to_dense(), dense * mask)
    assert weight.start is None
    return rows


def test_a_rank_without_rows(ranks):
    assert ranks.run(3, filled_in_place) == [2, 2, 0]


class Twice(nn.Module):
    """Two modules have one weight, which is in the middle."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.two = nn.Linear(16, 16)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.last(self.two(torch.tanh(self.one(torch.tanh(self.first(x))))))

    def init(self):
        torch.manual_seed(3)
        for part in (self.first, self.one, self.last):
            nn.init.normal_(part.weight, std=0.3)
        for part in self.children():
            nn.init.zeros_(part.bias)
        return self


def twice(device, shard):
    with torch.device(device):
        model = Twice() if device == "meta" else Twice().init()
    options = {"skip_first": False, "skip_head": False, "adapter_rank": 2, "backend": "aot_eager"}
    slope_fx.compile(model, example_inputs=X.to(device), **options)
    if shard:
        fully_shard(model)
    return model if device == "cpu" else model.to_empty(device="cpu").init()


def shared(shard):
    want = twice("cpu", False)
    model = twice("meta", shard)
    assert model.one.weight_values is model.two.weight_values
    assert model.one.weight_sparse is model.two.weight_sparse
    assert list(model.state_dict()) == list(want.state_dict())
    for one in (model, want):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(3):
            one(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert model.one.weight_values is model.two.weight_values
    for name, tensor in want.state_dict().items():
        if "lora_A" not in name:
            torch.testing.assert_close(whole(model.state_dict()[name]), tensor)


@pytest.mark.parametrize("shard", [False, True])
def test_a_shared_weight_stays_shared(ranks, shard):
    ranks.run(2, shared, shard)


def told():
    model = fsdp_blocks(compiled("llama"))
    schedule = slope_fx.Schedule(model, 10)
    models.loss_of(model, models.batch()).backward()
    with (
        mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError("gathered")),
        pytest.warns(TrainingWarning, match="adapters are trained already"),
    ):
        schedule.step()
    return dist.get_rank()


def test_a_warning_gathers_nothing(ranks):
    ranks.run(2, told)
