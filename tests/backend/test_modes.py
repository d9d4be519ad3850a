"""Compiling has no side effects on the caller: passes and races see none of the caller's modes."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import slope_fx
from formulas import assert_gradients_match, formula_model
from slope_fx.kernels import selection


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Blocks(nn.Module):
    """Blocks that the parent checkpoints, from outside of their compiled graphs."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 4)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            if self.reentrant is None or torch.compiler.is_exporting():
                h = block(h)
            else:
                h = checkpoint(block, h, use_reentrant=self.reentrant)
        return self.head(h)


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    # As selective activation checkpointing has it, so that Dynamo compiles within.
    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Noting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def compiled(model: nn.Module, backend, x: torch.Tensor, **more) -> nn.Module:
    slope_fx.compile(model, adapter_rank=4, example_inputs=x, backend=backend, **more)
    slope_fx.Schedule(model, 1, adapter_start=0.0)
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_B.data.normal_()
    return model


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.full])],
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_compiled_blocks(backend, reentrant):
    """In both phases, for each compiles within the checkpointed region."""
    dense, x = Blocks(reentrant), torch.randn(4, 6, 8)
    model = slope_fx.compile(
        copy.deepcopy(dense), adapter_rank=4, example_inputs=x, backend=backend, region="blocks",
        on_fallback="error",
    )  # fmt: skip
    schedule = slope_fx.Schedule(model, 2, adapter_start=0.5)
    for phase in ("sparse", "adapter"):
        assert schedule.phase == phase
        model.zero_grad()
        model(x).square().sum().backward()
        oracle = formula_model(dense, model)
        oracle.model.reentrant = None
        oracle(x.double()).square().sum().backward()
        assert_gradients_match(model, oracle, rtol=1e-4)
        schedule.step()
        for weight in slope_fx.sparse_weights(model).values():
            weight.lora_B.data.normal_()


def test_checkpoint_wrappers_put_around_compiled_blocks():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    dense, x = Blocks(), torch.randn(4, 6, 8)
    model = slope_fx.compile(
        copy.deepcopy(dense), adapter_rank=4, example_inputs=x, backend="aot_eager",
        region="blocks", on_fallback="error",
    )  # fmt: skip
    slope_fx.Schedule(model, 1, adapter_start=0.0)
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_B.data.normal_()
    oracle = formula_model(dense, model)
    apply_activation_checkpointing(
        model, checkpoint_wrapper, check_fn=lambda module: isinstance(module, Block)
    )
    got, want = model(x), oracle(x.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    got.square().sum().backward()
    want.square().sum().backward()
    for name, (weight, mask, *_) in oracle.layers.items():
        (values,) = (w.values for n, w in slope_fx.sparse_weights(model).items() if n == name)
        torch.testing.assert_close(
            values.grad.double().flatten(), weight.grad[mask], rtol=1e-3, atol=1e-3
        )


@contextlib.contextmanager
def hooks(seen: list):
    def pack(tensor):
        seen.append(type(tensor).__name__)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "saved-tensor hooks": lambda: hooks([]),
    "TorchFunction mode": Noting,
    "TorchDispatch mode": Counting,
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
    "deterministic": deterministic,
}


def state():
    return {
        "grad": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"), "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(), "rng": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "functions": len(torch.overrides._get_current_function_mode_stack()),
        "dispatch": torch._C._len_torch_dispatch_stack(),
        "hooks": torch._C._autograd._top_saved_tensors_default_hooks(False) is not None,
    }  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_passes_see_no_mode_of_the_caller(mode, monkeypatch):
    """A pass of the user's own looks around; what it sees is the same under every mode."""
    monkeypatch.setenv("SLOPE_FX_ENGINES", "cpu,dense")  # so that engines are raced too
    selection.forget()
    seen = []

    def look(gm):
        seen.append(state())
        torch.rand(3)  # which must not show

    model = Blocks()
    x = torch.randn(4, 6, 8)
    backend = slope_fx.rewriting_backend("eager", passes=[look, ..., look])
    model = compiled(model, None, x)
    here = {}

    def call():
        torch._dynamo.reset()
        model.compile(backend=backend)
        with torch.random.fork_rng():
            model(x)

    call()
    plain, seen[:] = seen[0], []
    with MODES[mode]():
        here["before"] = state()
        call()
        here["after"] = state()
    assert seen, "nothing was compiled under this mode"
    if mode == "autocast":  # a part of what the graph computes
        plain = {**plain, "autocast": True}
    for found in seen:
        assert {**found, "rng": 0} == {**plain, "rng": 0}
    assert here["before"] == here["after"]


def test_saved_tensor_hooks_see_what_the_dense_model_saves_and_no_fake_tensors():
    x, seen = torch.randn(4, 6, 8), []
    model = compiled(Blocks(), "aot_eager", x)
    with hooks(seen):
        model(x)
    first, seen[:] = list(seen), []
    with hooks(seen):
        model(x)
    assert first == seen
    assert "FakeTensor" not in first


@pytest.mark.parametrize("mode", [Counting, Noting])
def test_modes_that_count_operations_count_none_of_ours(mode):
    x = torch.randn(4, 6, 8)
    model = compiled(Blocks(), "eager", x)
    with mode() as first:
        model(x)
    with mode() as second:
        model(x)
    assert first.seen
    assert first.seen == second.seen  # though the first call compiled


def test_random_state_is_that_of_an_eager_run():
    """The first call compiles and races engines; neither moves the random numbers to come."""
    selection.forget()
    x = torch.randn(4, 6, 8)
    model = Blocks()
    model.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 4))
    model = compiled(model, "aot_eager", x, engine="cpu,dense")
    torch.manual_seed(1)
    model(x)
    first = torch.rand(1)
    torch.manual_seed(1)
    model(x)
    assert torch.equal(first, torch.rand(1))
