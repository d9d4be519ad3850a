"""Masks that are N:M along both dimensions: valid, near the best, and what they are for."""

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import slope_fx
from models import batch, gpt2, llama
from slope_fx.planning.transposable import transposable_mask
from strategies import normal, patterns, seeds, weights


def largest_sum(block: torch.Tensor, n: int) -> float:
    """The largest sum of scores, by a flow from rows to columns: an exact algorithm."""
    graph, m = networkx.DiGraph(), len(block)
    for i in range(m):
        graph.add_edge("source", ("row", i), capacity=n, weight=0)
        graph.add_edge(("column", i), "sink", capacity=n, weight=0)
        for j in range(m):
            cost = -round(1e6 * block[i, j].item())
            graph.add_edge(("row", i), ("column", j), capacity=1, weight=cost)
    flow = networkx.max_flow_min_cost(graph, "source", "sink")
    return sum(block[i, j].item() * flow["row", i]["column", j] for i in range(m) for j in range(m))


def blocks_of(matrix: torch.Tensor, m: int) -> torch.Tensor:
    return matrix.unflatten(0, (-1, m)).unflatten(2, (-1, m)).transpose(1, 2).flatten(0, 1)


@settings(max_examples=40)
@given(patterns, st.integers(1, 3), st.integers(1, 3), st.data())
def test_rows_and_columns_keep_n_of_each_m(pattern, down, across, data):
    n, m = pattern.n, pattern.m
    scores = data.draw(weights((down * m, across * m), torch.float32))
    blocks = blocks_of(transposable_mask(scores, n, m), m)
    assert blocks.shape == (down * across, m, m)
    assert (blocks.sum(1) == n).all()
    assert (blocks.sum(2) == n).all()


@settings(max_examples=25)
@given(patterns, seeds)
def test_the_sum_is_near_the_largest_one(pattern, seed):
    n, m = pattern.n, pattern.m
    scores = normal((2 * m, m), seed).abs()
    kept = blocks_of(transposable_mask(scores, n, m), m)
    for block, mask in zip(blocks_of(scores, m), kept, strict=True):
        best = largest_sum(block, n)
        assert block[mask].sum().item() >= (1 - 1e-5 if m <= 4 else 0.97) * best


@pytest.mark.parametrize("make", [gpt2, pytest.param(llama, marks=pytest.mark.full)])
@pytest.mark.parametrize("pattern", [pytest.param("2:4", marks=pytest.mark.full), "2:8"])
def test_the_backward_pass_prunes_nothing(make, pattern):
    """So the gradients of the inputs are those of the dense product with ``W^R``."""
    torch.manual_seed(0)
    model = slope_fx.compile(make(), pattern, mask="transposable", backend="aot_eager")
    dense = slope_fx.densify(model)
    for weight in slope_fx.sparse_weights(model).values():
        assert torch.equal(weight.forward_mask(), weight.backward_mask())
    gradients = []
    for each in (model, dense):
        ids = batch()
        each(input_ids=ids, labels=ids).loss.backward()
        gradients.append(each.get_input_embeddings().weight.grad)
    got, want = gradients
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_after_steps_and_refreshes_it_still_prunes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    x = torch.randn(6, 16)
    model = slope_fx.compile(model, mask="transposable", example_inputs=x, backend=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = slope_fx.Schedule(model, 4, backward_mask_interval=1)
    for _ in range(4):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for weight in slope_fx.sparse_weights(model).values():
        assert torch.equal(weight.forward_mask(), weight.backward_mask())
