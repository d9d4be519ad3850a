"""The ops on DTensors of any placement give what the oracle gives."""

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from oracle import DenseOracle, assert_same, assert_within_rounding
from slope_fx import ops
from slope_fx.ops.sharding import columns_split, rows_split
from strategies import normal, patterns, seeds, sizes

WORLD = 2


def products(pattern, size, leading, placements, with_bias, seed):
    """One linear, forward and backward, with its operands placed as asked."""
    (d_out, d_in), (n, m) = size, (pattern.n, pattern.m)
    of_x, of_weight = placements
    mesh = init_device_mesh("cpu", (WORLD,))
    dense = normal((d_out, d_in), seed)
    forward = ops.magnitude_mask(dense, n, m)
    values = ops.compress(dense, forward, n, m)
    backward = ops.backward_mask(values, forward, n, m)
    x, bias = normal((*leading, d_in), seed + 1), normal((d_out,), seed + 2)
    grad = normal((*leading, d_out), seed + 3)

    def placed(tensor, placement, trains=True):
        return distribute_tensor(tensor, mesh, [placement]).requires_grad_(trains)

    inputs = [placed(x, of_x), placed(values, of_weight)]
    masks = [placed(mask, of_weight, False) for mask in (forward, backward)]
    bias_is = of_weight if of_weight == Shard(0) else Replicate()
    inputs += [placed(bias, bias_is)] if with_bias else []
    y = ops.sparse_linear(inputs[0], inputs[1], *masks, inputs[2] if with_bias else None, n, m)
    y.redistribute(placements=[Replicate()]).backward(placed(grad, Replicate(), False))

    oracle = DenseOracle.of(values, forward, backward, n, m)
    answers = [oracle.input_grad(grad), oracle.weight_grad(grad, x)]
    if with_bias:
        flat = grad.double().reshape(-1, d_out)
        answers.append((flat.sum(0), flat.abs().sum(0)))
    for tensor, answer in zip(inputs, answers, strict=True):
        assert_within_rounding(tensor.grad.full_tensor(), *answer, torch.float32)
    answer = oracle.forward(x, bias if with_bias else None)
    assert_within_rounding(y.full_tensor().detach(), *answer, torch.float32)

    expanded = ops.expand(inputs[1].detach(), *masks, n, m)
    assert_same(expanded.full_tensor(), oracle.weight.float())
    again = ops.compress(expanded, masks[0], n, m)
    assert_same(again.full_tensor(), values)
    assert_same(ops.backward_mask(again, masks[0], n, m).full_tensor(), backward)
    shaped = distribute_tensor(dense, mesh, [of_weight])
    assert_same(ops.magnitude_mask(shaped, n, m).full_tensor(), forward)
    return y.placements[0], inputs[1].grad.placements[0]


leadings = st.sampled_from([(1,), (7,), (4, 3), (2, 3, 2)])


@st.composite
def placed(draw, leading):
    """Placements of x and of the weight, also those that no rule takes as they are."""
    rank = len(leading) + 1
    dims = [i for i in range(rank - 1) if leading[i] >= WORLD] + [rank - 1]
    of_x = draw(st.sampled_from([Replicate(), *map(Shard, dims)]))
    matching = [(Replicate(), Shard(0)), (Shard(rank - 1), Shard(1))]
    if draw(st.booleans()):
        return draw(st.sampled_from(matching))
    return of_x, draw(st.sampled_from([Replicate(), Shard(0), Shard(1)]))


# A failed example ends the ranks, so shrinking would take many minutes.
@settings(
    max_examples=40, deadline=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(st.data(), patterns, leadings, st.booleans(), seeds)
def test_products_of_dtensors(ranks, data, pattern, leading, with_bias, seed):
    m = pattern.m
    # Half of the weights can be split in both ways, and half of those placements match.
    size = data.draw(sizes(pattern) | st.sampled_from([(2 * m, 16 * m), (6 * m, 16 * m)]))
    placements = data.draw(placed(leading))
    of_y, _ = ranks.run(WORLD, products, pattern, size, leading, placements, with_bias, seed)[0]
    features = Shard(len(leading))
    (d_out, d_in), (n, m) = size, (pattern.n, pattern.m)
    if placements == (Replicate(), Shard(0)) and rows_split(d_out, m, WORLD):
        assert of_y == features
    if placements == (features, Shard(1)) and columns_split(d_in, n, m, WORLD):
        assert of_y == Partial()
    if placements[1] == Replicate() and placements[0] not in (Replicate(), features):
        assert of_y == placements[0]
