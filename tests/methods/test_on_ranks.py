"""The methods on several ranks train as in one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

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
@pytest.mark.parametrize("name", ["sr-ste", pytest.param("gradual", marks=FULL)])
def test_tensor_parallel(ranks, name):
    assert max(ranks.run(2, split, name)) < 1e-4


def evolve():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    assert mesh.size() == 2
    with pytest.raises(UnsupportedError, match='method="evolve" runs on one process'):
        schedule_of(compiled(backend="eager", method=Evolve()))


def test_evolve_is_refused(ranks):
    ranks.run(2, evolve)
