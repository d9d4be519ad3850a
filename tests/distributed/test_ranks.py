"""The helper that runs functions on ranks tells of what goes wrong in one."""

import os

import pytest
import torch
import torch.distributed as dist

from ranks import RankError


def add(amount):
    total = torch.tensor(dist.get_rank() + amount)
    dist.all_reduce(total)
    return total.item()


def fail():
    if dist.get_rank() == 1:
        raise ValueError("wrong here")
    dist.barrier()


def end():
    if dist.get_rank() == 0:
        os._exit(3)


def test_results_and_errors(ranks):
    assert ranks.run(2, add, 10) == [21, 21]
    with pytest.raises(RankError, match=r"rank 1: (?s:.*)wrong here"):
        ranks.run(2, fail)
    with pytest.raises(RankError, match="rank 0: ended with 3"):
        ranks.run(2, end)
    assert ranks.run(3, add, 0) == [3, 3, 3]
