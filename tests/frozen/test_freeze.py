"""``freeze``: the logits of the dense model, by the road that users take, and its refusals."""

import copy
import gc
import sys
import weakref

import pytest
import torch
from torch import nn

import slope_fx
from architectures import ARCHITECTURES, inputs_of, logits_of, made, shaken
from models import awake, batch, gpt2, llama, loss_of
from slope_fx.errors import ArgumentError, StateError, UnsupportedError
from slope_fx.frozen import FrozenWeight
from slope_fx.kernels import racing
from slope_fx.ops.frozen import FROZEN_LINEAR, FROZEN_LINEARS

freezing = sys.modules["slope_fx.frozen.freeze"]  # the name in the package is the function


def size_of(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in {*model.parameters(), *model.buffers()})


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


@pytest.mark.inductor
@pytest.mark.parametrize("make", [gpt2, pytest.param(llama, marks=pytest.mark.full)])
@pytest.mark.parametrize("cache", ["static", pytest.param("dynamic", marks=pytest.mark.full)])
def test_the_logits_and_the_text_of_the_dense_model(make, cache):
    model = awake(make())
    dense = slope_fx.densify(model)
    frozen = slope_fx.freeze(model)
    ids = batch()
    with torch.no_grad():
        assert gap(frozen(ids).logits, dense(ids).logits) < 1e-5
        want = dense.generate(ids[:, :4], max_new_tokens=8, do_sample=False)
        text = frozen.generate(
            ids[:, :4], max_new_tokens=8, do_sample=False, cache_implementation=cache
        )
        assert text.tolist() == want.tolist()


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=(pytest.mark.inductor, pytest.mark.full))],
)
@pytest.mark.parametrize("values", ["float", pytest.param("int8", marks=pytest.mark.full)])
def test_products_with_one_input_are_one_call(backend, values):
    """q, k and v, and gate and up; q, k and v of the first block stay dense."""
    graphs = []
    model = awake(llama(), backend=backend, passes=[..., graphs.append])
    ids = batch()
    frozen = slope_fx.freeze(model, values=values)
    graphs.clear()
    with torch.no_grad():
        want = slope_fx.densify(copy.deepcopy(frozen))(ids).logits
        assert gap(frozen(ids).logits, want) < 1e-3
    calls = [node for gm in graphs for node in gm.graph.nodes if node.target is FROZEN_LINEARS]
    assert sorted(len(node.args[1]) for node in calls) == [2, 2, 3]


def test_what_training_needs_is_gone():
    model = awake(gpt2())
    names = set(model.state_dict())
    frozen = slope_fx.freeze(model)
    assert frozen is model
    kept = set(frozen.state_dict())
    assert {name for name in names - kept} == {n for n in names if n.endswith("backward_bits")}
    assert not any(p.requires_grad for p in frozen.parameters())
    weights = slope_fx.sparse_weights(frozen).values()
    assert all(isinstance(weight, FrozenWeight) for weight in weights)


def test_the_random_state_of_the_user_stays(monkeypatch):
    """Also if the routes are measured, which draws inputs and weights."""
    monkeypatch.setattr(racing, "recall", lambda *args: None)  # as on a new machine
    monkeypatch.setenv("SLOPE_FX_ENGINES", "cpu,dense")
    measured = []
    run = racing.run
    monkeypatch.setattr(racing, "run", lambda *args: measured.append(args) or run(*args))
    model = awake(gpt2())
    before = torch.get_rng_state()
    slope_fx.freeze(model)
    assert measured
    assert torch.equal(torch.get_rng_state(), before)


def test_inactive_adapters_are_dropped():
    """They are large here, so that one that takes part would show."""
    model = slope_fx.compile(gpt2().eval(), "2:4", adapter_rank=4, backend="aot_eager")
    with torch.no_grad():
        for weight in slope_fx.sparse_weights(model).values():
            weight.lora_B.normal_()
        want = slope_fx.densify(model)(batch()).logits
        frozen = slope_fx.freeze(model)
        assert all(weight.rank is None for weight in slope_fx.sparse_weights(frozen).values())
        assert gap(frozen(batch()).logits, want) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float32])
def test_nine_sixteenths_of_the_bytes_of_dense_bf16(dtype):
    """And nothing holds the parameters of before any more."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(4)])
    model = slope_fx.compile(
        model, "2:4", example_inputs=torch.randn(2, 256), skip_first=False, skip_head=False
    )
    before = [weakref.ref(p) for p in model.parameters()]
    frozen = slope_fx.freeze(model, dtype=dtype)
    per_element = size_of(frozen) / (4 * 256 * 256)
    assert per_element == (0.5625 * 2 if dtype == "bfloat16" else 2 + 1 / 8)
    gc.collect()
    assert [ref() for ref in before if ref() is not None] == []


@pytest.mark.full
@pytest.mark.inductor
def test_bf16_is_within_its_rounding():
    model = awake(llama())
    dense = slope_fx.densify(model).to(torch.bfloat16)
    frozen = slope_fx.freeze(model, dtype="bfloat16")
    rotary = [b for n, b in frozen.named_buffers() if "inv_freq" in n]
    assert all(buffer.dtype is torch.float32 for buffer in rotary)
    with torch.no_grad():
        assert gap(frozen(batch()).logits, dense(batch()).logits) < 0.05


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("values", "most", "left"),
    [pytest.param("int8", 0.02, 0.9, marks=pytest.mark.full), ("int4", 0.3, 0.9)],
)
def test_quantised_values(values, most, left):
    """The adapters make up for a part of the error."""
    model = awake(llama(), rank=None)
    dense = slope_fx.densify(model)
    ids = batch()
    with torch.no_grad():
        want = dense(ids).logits
        errors = []
        for rank in (None, 16):
            frozen = slope_fx.freeze(copy.deepcopy(model), values=values, adapter_rank=rank)
            errors.append((frozen(ids).logits - want).square().mean().sqrt() / want.std())
            weight = next(iter(slope_fx.sparse_weights(frozen).values()))
            assert weight.rank == rank
            assert weight.values.dtype is (torch.int8 if values == "int8" else torch.uint8)
    assert errors[0] < most
    assert errors[1] < left * errors[0]


def test_quantising_keeps_what_the_adapters_add():
    """The new adapter is the best of its rank for the old adapter and the error together."""
    model = awake(gpt2(), rank=8)
    weights = slope_fx.sparse_weights(model)
    before = {
        name: weight.to_dense().double() + weight.scale * (weight.lora_B @ weight.lora_A).double()
        for name, weight in weights.items()
    }
    frozen = slope_fx.freeze(model, values="int4", group=32)
    for name, weight in slope_fx.sparse_weights(frozen).items():
        rest = before[name] - weight.to_dense().double()
        u, s, vh = torch.linalg.svd(rest)
        best = rest - (u[:, :8] * s[:8]) @ vh[:8]
        got = rest - (weight.lora_B.double() @ weight.lora_A.double())
        torch.testing.assert_close(got.norm(), best.norm(), rtol=1e-4, atol=1e-6)


def test_calibrated_adapters_minimize_the_error_of_the_outputs():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    data = torch.randn(256, 64) @ torch.diag(torch.logspace(-2, 1, 64))
    model = slope_fx.compile(layers, "2:4", example_inputs=data, skip_first=False)
    errors = []
    with torch.no_grad():
        want = slope_fx.densify(model)[0](data)
        for calibration in (None, [data]):
            frozen = slope_fx.freeze(
                copy.deepcopy(model), values="int4", adapter_rank=4, calibration=calibration
            )
            errors.append((frozen[0](data) - want).norm())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"values": "int2"}, "values='int2'; allowed are 'float', 'int8', 'int4'"),
        ({"values": "int8", "group": 33}, "group=33; allowed are 32, 64, 128"),
        ({"group": 32}, 'group was given with values="float"'),
        ({"adapter_rank": 4}, "adapter_rank was given"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"values": "int8", "adapter_rank": 10**6}, "rank 1000000 for"),
    ],
)
def test_bad_arguments_change_nothing(arguments, said):
    model = awake(gpt2())
    with pytest.raises(ArgumentError, match=said):
        slope_fx.freeze(model, **arguments)
    assert not any(isinstance(m, FrozenWeight) for m in model.modules())


@pytest.mark.full
@pytest.mark.parametrize(("values", "what"), [("float", "form_of_parts"), ("int8", "low_rank")])
def test_an_interrupted_freeze_leaves_the_model_as_it_was(values, what, monkeypatch):
    """Measurements and decompositions take long: Ctrl-C at the third layer loses nothing."""
    model, calls = awake(gpt2()), 0
    original = getattr(freezing, what)

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(freezing, what, interrupted)
        with pytest.raises(KeyboardInterrupt):
            slope_fx.freeze(model, values=values)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    loss_of(model, batch()).backward()
    slope_fx.freeze(model, values=values)


@pytest.mark.parametrize(
    ("which", "said"), [("values", "it has NaN"), ("lora_B", "its adapter has NaN")]
)
def test_nan_is_refused_before_anything_changes(which, said):
    model = awake(gpt2())
    weight = list(slope_fx.sparse_weights(model).values())[-1]
    getattr(weight, which).data.view(-1)[-1] = float("nan")
    with pytest.raises(UnsupportedError, match=rf"c_proj can't be quantised: {said}"):
        slope_fx.freeze(model, values="int8")
    assert not any(isinstance(m, FrozenWeight) for m in model.modules())
    assert isinstance(slope_fx.freeze(model), nn.Module)


@pytest.mark.full
def test_casts_keep_the_scales():
    model = awake(llama())
    frozen = slope_fx.freeze(model, values="int8")
    ids = batch()
    with torch.no_grad():
        want = frozen(ids).logits
        half = copy.deepcopy(frozen).to(torch.float16).to(torch.float32)
        for name, weight in slope_fx.sparse_weights(half).items():
            assert weight.scales.dtype is torch.bfloat16
            torch.testing.assert_close(weight.scales, slope_fx.sparse_weights(frozen)[name].scales)
        assert gap(half(ids).logits, want) < 0.02
        assert gap(frozen.to(torch.bfloat16)(ids).logits, want) < 0.05


def test_patterns_and_shared_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x).relu()).relu())

    torch.manual_seed(0)
    model = slope_fx.compile(
        Twice(), {"a": "1:4", "*": "4:8"}, example_inputs=torch.randn(2, 32), skip_first=False,
        skip_head=False,
    )  # fmt: skip
    x = torch.randn(3, 32)
    with torch.no_grad():
        want = slope_fx.densify(model)(x)
        frozen = slope_fx.freeze(model)
        assert frozen.a.weight_values is frozen.b.weight_values
        assert gap(frozen(x), want) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture(name, rank):
    """With Inductor, in both phases. ``benchmarks/coverage.py`` exports each."""
    torch.manual_seed(0)
    model = shaken(made(name)).eval()
    inputs = inputs_of(model)
    model = awake(model, rank, example_inputs=inputs)
    dense = slope_fx.densify(model)
    frozen = slope_fx.freeze(model)
    with torch.no_grad():
        want = logits_of(dense, inputs)
        assert gap(logits_of(frozen, inputs), want) < 1e-4


@pytest.mark.full
@pytest.mark.inductor
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Mixtral", "float"),
        pytest.param("Mixtral", "int8", marks=pytest.mark.full),
        pytest.param("gpt-oss", "float", marks=pytest.mark.full),
        pytest.param("gpt-oss", "int8", marks=pytest.mark.full),
    ],
)
def test_experts_are_not_expanded(name, values):
    """An expert that has no token costs nothing: to expand all would cost more than dense."""
    torch.manual_seed(0)
    model = shaken(made(name)).eval()
    inputs = inputs_of(model)
    model = slope_fx.freeze(awake(model, example_inputs=inputs), values=values)
    dense = slope_fx.densify(model)
    with torch.no_grad():
        got, want = logits_of(model, inputs), logits_of(dense, inputs)
        assert gap(got, want) < (1e-4 if values == "float" else 0.02)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            logits_of(model, inputs)
    called = {event.key for event in profile.key_averages()}
    assert "slope_fx::frozen_grouped_linear" in called
    assert "slope_fx::frozen_expand" not in called


def test_gradients_are_refused():
    frozen = slope_fx.freeze(awake(gpt2()))
    weight = next(iter(slope_fx.sparse_weights(frozen).values()))
    with pytest.raises(UnsupportedError, match="frozen"):
        frozen.requires_grad_()
    assert not any(p.requires_grad for p in frozen.parameters())
    with pytest.raises(UnsupportedError, match="frozen"):
        weight.values.requires_grad = True
    with pytest.raises(StateError, match=r"training mode.*eval"):
        frozen.train()(batch(), labels=batch())
    with pytest.raises(StateError, match="can't be written"):
        weight.write_(weight.to_dense())
    with pytest.raises(StateError, match="backward"):
        weight.backward_mask()
    with pytest.raises(StateError, match="frozen"):
        slope_fx.freeze(frozen)
    layer = frozen.transformer.h[1].mlp.c_fc
    with pytest.raises(UnsupportedError, match=r"c_fc: add_.* writes to it"), torch.no_grad():
        layer.weight.add_(1)


def test_a_model_that_is_not_compiled_is_refused():
    with pytest.raises(StateError, match=r"slope_fx\.compile"):
        slope_fx.freeze(gpt2())


def test_a_mask_that_something_wrote_into_is_refused_and_nothing_changes():
    model = awake(gpt2())
    weight = list(slope_fx.sparse_weights(model).values())[-1]
    weight.forward_bits.data.fill_(255)
    with pytest.raises(UnsupportedError, match="should be 2:4"):
        slope_fx.freeze(model)
    assert not any(isinstance(m, FrozenWeight) for m in model.modules())
    assert any(p.requires_grad for p in model.parameters())


def test_a_copy_and_a_pickle_are_frozen_too(tmp_path):
    frozen = slope_fx.freeze(awake(gpt2()))
    ids = batch()
    with torch.no_grad():
        want = frozen(ids).logits
        assert gap(copy.deepcopy(frozen)(ids).logits, want) < 1e-6
        torch.save(frozen, tmp_path / "model")
        again = torch.load(tmp_path / "model", weights_only=False)
        assert gap(again(ids).logits, want) < 1e-6
    with pytest.raises(StateError, match="training mode"):
        copy.deepcopy(frozen).train()(ids)


@pytest.mark.parametrize("make", [gpt2, pytest.param(llama, marks=pytest.mark.full)])
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.full)])
def test_an_export_holds_the_sparse_products(make, strict):
    frozen = slope_fx.freeze(awake(make()))
    ids = batch()
    with torch.no_grad():
        program = torch.export.export(frozen, (ids,), {"use_cache": False}, strict=strict)
        targets = [node.target for node in program.graph.nodes]
        assert targets.count(FROZEN_LINEAR) == len(slope_fx.sparse_weights(frozen))
        assert not any("expand" in str(t) and "slope_fx" in str(t) for t in targets)
        assert gap(program.module()(ids, use_cache=False).logits, frozen(ids).logits) < 1e-5
