"""The methods on several ranks train as in one process."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import slope_fx
from parallel import alone, assert_same, compiled, schedule_of, together
from slope_fx.errors import UnsupportedError
from slope_fx.methods import SRSTE, SSTE, Evolve, Gradual
from ways import WAYS, tensor_parallel

STEPS = 12
MASTERS = [SRSTE(decay=0.05), SSTE(), Gradual(end=0.25)]
FULL = pytest.mark.full
CASES = [
    ("FSDP2", "gradual", "gpt2", 2),
    pytest.param("DDP", "sr-ste", "llama", 2, marks=FULL),
    pytest.param("FSDP2", "sr-ste", "gpt2", 2, marks=FULL),
    pytest.param("FSDP2", "s-ste", "gpt2", 2, marks=FULL),
    pytest.param("FSDP2", "s-ste", "llama", 3, marks=FULL),
    pytest.param("FSDP2, masks whole", "sr-ste", "gpt2", 2, marks=FULL),
    pytest.param("DDP", "gradual", "gpt2", 2, marks=FULL),
]


def named(name):
    return next(method for method in MASTERS if method.name == name)


def train(way, name, model):
    made = compiled(model, backend="eager", method=named(name))
    got = together(made, WAYS[way], steps=STEPS)
    if way.startswith("FSDP2"):
        with pytest.raises(UnsupportedError, match=r"is sharded\. Save the model"):
            slope_fx.compress_(made)
    return got


@pytest.mark.parametrize(("way", "name", "model", "world"), CASES)
def test_equal_to_one_process(ranks, way, name, model, world):
    want = alone(world, compiled(model, backend="eager", method=named(name)), steps=STEPS)
    for got in ranks.run(world, train, way, name, model):
        assert_same(got, want)


def split(name):
    """Tensor parallelism: the same loss and gradients as whole."""
    whole = compiled("llama", backend="aot_eager", method=named(name))
    parts = tensor_parallel(compiled("llama", backend="aot_eager", method=named(name)))
    ids = torch.arange(24).view(2, 12)
    for model in (whole, parts):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    errors = []
    for one, other in zip(
        slope_fx.sparse_weights(whole).values(), slope_fx.sparse_weights(parts).values(),
        strict=True,
    ):  # fmt: skip
        want, got = one.values.grad, other.values.grad.full_tensor()
        errors.append(((got - want).abs().max() / want.abs().max()).item())
    return max(errors)


@pytest.mark.full
@pytest.mark.parametrize("name", ["sr-ste", "s-ste", "gradual"])
def test_tensor_parallel(ranks, name):
    assert max(ranks.run(2, split, name)) < 1e-4


MOVES = Evolve(interval=2, rate=0.3)


def evolve(way, micro_batches):
    model = compiled(method=MOVES)
    return together(model, WAYS[way], steps=STEPS, micro_batches=micro_batches)


@pytest.mark.parametrize(
    ("way", "micro_batches"),
    [
        pytest.param("DDP", 2, marks=FULL),
        pytest.param("DDP", 1, marks=FULL),
        pytest.param("DDP, static graph", 1, marks=FULL),
    ],
)
def test_masks_evolve_as_in_one_process(ranks, way, micro_batches):
    first = slope_fx.sparse_weights(compiled(method=MOVES))
    want = alone(2 * micro_batches, compiled(method=MOVES), steps=STEPS)
    moved = [
        want["state"][f"{name}.weight_sparse.forward_bits"] != w.forward_bits
        for name, w in first.items()
    ]
    assert all(bits.any() for bits in moved)
    for got in ranks.run(2, evolve, way, micro_batches):
        assert_same(got, want)


class Skipping(torch.nn.Module):
    """A model whose second layer takes part on rank 0 alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x, skip):
        x = self.first(x)
        return x if skip else x + self.second(x)


def evolve_where_layers_rest(everywhere):
    model = slope_fx.compile(
        Skipping(), method=MOVES, backend="eager", skip_first=False, skip_head=False,
        example_inputs=(torch.zeros(2, 16), False),
    )  # fmt: skip
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer, schedule = torch.optim.AdamW(model.parameters(), lr=1e-2), schedule_of(model)
    weights = slope_fx.sparse_weights(model)
    before = {name: w.forward_bits.clone() for name, w in weights.items()}
    for _ in range(4):
        wrapped(
            torch.randn(8, 16), skip=everywhere or dist.get_rank() == 1
        ).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    moved = [not torch.equal(before[name], w.forward_bits) for name, w in weights.items()]
    return moved, [w.forward_bits.clone() for w in weights.values()]


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=FULL)])
def test_a_layer_that_rests_on_one_rank_evolves_on_both(ranks, everywhere):
    (moved, one), (_, other) = ranks.run(2, evolve_where_layers_rest, everywhere)
    assert moved == [True, not everywhere]
    assert all(map(torch.equal, one, other))


def evolve_in_no_wrapper(sharded):
    model = compiled(backend="eager", method=MOVES)
    schedule = schedule_of(model)
    if sharded:
        WAYS["FSDP2"](model)
        with pytest.raises(UnsupportedError, match=r'is sharded.* Train method="evolve" on one'):
            schedule_of(model)
    said = "is sharded" if sharded else "is in no wrapper: the masks of 2 ranks would move apart"
    with pytest.raises(UnsupportedError, match=said):
        schedule.step()


@pytest.mark.parametrize("sharded", [False, True])
def test_evolve_in_no_wrapper_is_refused(ranks, sharded):
    ranks.run(2, evolve_in_no_wrapper, sharded)
