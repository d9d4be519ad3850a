"""The cuSPARSELt engine on the CPU, with a checking stand-in for NVIDIA's library.

What the library itself computes, and how fast, only a GPU shows; all that is around its calls
runs here: padding, layout, refusal, and above all that no operand outlives its weight.
"""

import contextlib
import copy
import gc
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fake_cusparselt as fake
import formulas
import models
import slope_fx
from models import batch, loss_of
from oracle import DenseOracle, assert_within_rounding
from slope_fx.kernels import dense, engines, operands, racing, reference, selection
from slope_fx.kernels.cusparselt import Cusparselt, library
from slope_fx.planning.patterns import Pattern
from strategies import normal, seeds

B16 = torch.bfloat16
CPU = torch.device("cpu")
CONTAINED = [Pattern(*nm) for nm in ((2, 4), (1, 4), (2, 8), (1, 8), (1, 2), (2, 16), (1, 16))]


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """The engine with the stand-in, chosen for everything, keeping all that it may."""
    monkeypatch.setenv("SLOPE_FX_ENGINES", "cusparselt")
    monkeypatch.setenv("SLOPE_FX_KEEP_OPERANDS", "1")
    monkeypatch.setenv("SLOPE_FX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(racing, "_SECONDS", 0.0)
    monkeypatch.setattr(racing, "_QUIET", float("inf"))
    racing.forget_disk()
    with fake.installed(monkeypatch) as engine:
        yield engine
    racing.forget_disk()


WHERE = ("cpu", *(["cuda"] if not library.unavailable() else []))


@pytest.fixture(params=WHERE)
def placed(request):
    """The engine and the device it computes on: with the stand-in, and on a GPU truly."""
    if request.param == "cuda":
        return engines.ENGINES["cusparselt"], torch.device("cuda", 0)
    return request.getfixturevalue("engine"), CPU


def layer(pattern, d_out, d_in, seed, dtype=B16):
    n, m = pattern.n, pattern.m
    weight = normal((d_out, d_in), seed, dtype)
    forward = dense.magnitude_mask(weight, n, m)
    values = dense.compress(weight, forward, n, m)
    return values, forward, dense.backward_mask(values, forward, n, m)


def strange(shape, seed, dtype, kind):
    """The same numbers in memory that the library wouldn't take as it lies."""
    plain = normal(shape, seed, dtype)
    if kind == "gaps":
        return normal(shape, seed, dtype, contiguous=False)
    if kind == "columns":
        return plain.reshape(-1, shape[-1]).t().contiguous().t().view(shape)
    if kind == "unaligned":
        return torch.cat([plain.new_zeros(1), plain.reshape(-1)])[1:].view(shape)
    return plain


def _moved(tensor, device):
    """On a device, with its strides and its offset in memory."""
    if device == CPU:
        return tensor
    storage = tensor.untyped_storage().to(device=device)
    return tensor.new_empty(0, device=device).set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


# --- products ------------------------------------------------------------------------------


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.data(),
    st.sampled_from(CONTAINED),
    st.sampled_from([B16, torch.float16]),
    st.sampled_from(["plain", "gaps", "columns", "unaligned"]),
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_products_against_the_oracle(placed, data, pattern, dtype, kind, bias, wide, seed):
    engine, device = placed
    n, m = pattern.n, pattern.m
    d_out = data.draw(st.sampled_from([1, 2, 3, 5, 8])) * m
    d_in = data.draw(st.sampled_from([1, 3, 4, 8])) * m
    leading = data.draw(st.sampled_from([(1,), (7,), (8,), (3, 5), (0,), (), (2, 16)]))
    kept_dtype = torch.float32 if wide else dtype
    values, forward, backward = layer(pattern, d_out, d_in, seed, kept_dtype)
    want = DenseOracle.of(values.to(dtype), forward, backward, n, m)
    kind = kind if leading else "plain"
    x = strange((*leading, d_in), seed + 1, dtype, kind)
    grad = strange((*leading, d_out), seed + 2, dtype, kind)
    b = strange((d_out,), seed + 3, dtype, "unaligned") if bias else None
    x, grad, b, values, forward, backward = (
        None if t is None else _moved(t, device) for t in (x, grad, b, values, forward, backward)
    )
    y = engine.sparse_linear(x, values, forward, b, n, m)
    assert_within_rounding(y, *want.forward(x, b), dtype)
    assert y.is_contiguous()
    dx = engine.sparse_input_grad(grad, values, forward, backward, n, m)
    assert_within_rounding(dx, *want.input_grad(grad), dtype)
    dw = engine.sparse_weight_grad(grad, x, forward, n, m, kept_dtype)
    assert dw.dtype == kept_dtype
    assert_within_rounding(dw.to(dtype), *want.weight_grad(grad, x), dtype)


def test_inputs_that_lie_right_are_not_copied(engine, monkeypatch):
    seen = []
    multiply = library.multiply
    monkeypatch.setattr(library, "multiply", lambda *a: (seen.append(a[1:3]), multiply(*a))[1])
    values, forward, backward = layer(Pattern(2, 4), 32, 16, 0)
    x, bias, grad = normal((8, 16), 1, B16), normal((32,), 2, B16), normal((8, 32), 3, B16)
    engine.sparse_linear(x.view(2, 4, 16), values, forward, bias, 2, 4)
    engine.sparse_input_grad(grad, values, forward, backward, 2, 4)
    (got_x, got_bias), (got_grad, _) = seen[0], seen[-1]
    for got, given_tensor in ((got_x, x), (got_bias, bias), (got_grad, grad)):
        assert got.data_ptr() == given_tensor.data_ptr()


def test_nan_and_infinity_show(engine):
    values, forward, backward = layer(Pattern(2, 4), 16, 16, 0)
    x = normal((3, 16), 1, B16)
    x[1, 4] = float("nan")
    y = engine.sparse_linear(x, values, forward, None, 2, 4)
    weight = reference.expand(values, forward, 2, 4)
    assert y[1][weight[:, 4] != 0].isnan().all()
    assert not y[[0, 2]].isnan().any()
    values[0, 0] = float("inf")
    y = engine.sparse_linear(x, values, forward, None, 2, 4)
    assert not y[0, 0].isfinite()
    dx = engine.sparse_input_grad(normal((3, 16), 2, B16), values, forward, backward, 2, 4)
    assert not dx.isfinite().all()


@pytest.mark.parametrize("pattern", [Pattern(3, 4), Pattern(4, 8), Pattern(3, 8), Pattern(8, 16)])
def test_patterns_that_are_not_contained_are_refused_aloud(engine, pattern):
    assert "more than two of four" in engine.why_not_pattern(pattern.n, pattern.m)
    engines.say_once.cache_clear()
    with pytest.warns(
        slope_fx.errors.EngineWarning, match=f"cusparselt engine is not used for {pattern}"
    ):
        name = selection.choose(
            "sparse_linear", 8, (16, 16 * pattern.n // pattern.m), pattern.n, pattern.m, B16, CPU
        )
    assert name == "dense"


def test_contained_patterns_truly_are():
    for n, m in ((p.n, p.m) for p in CONTAINED):
        assert Cusparselt(dense).why_not_pattern(n, m) == ""
        # The fullest two neighbouring groups, all of their values next to each other.
        group = torch.zeros(m)
        group[m - n :] = 1
        mask = torch.cat([group, group.flip(0), group, group])
        assert mask.view(-1, 4).sum(-1).max() <= 2


def test_other_dtypes_are_refused_aloud(engine):
    engines.say_once.cache_clear()
    with pytest.warns(slope_fx.errors.EngineWarning, match="bf16 and fp16, not torch.float32"):
        assert selection.choose("sparse_linear", 8, (16, 8), 2, 4, torch.float32, CPU) == "dense"


def test_the_library_is_not_there_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "built without cuSPARSELt" in library.unavailable() or "no CUDA" in library.unavailable()
    with pytest.raises(slope_fx.errors.ArgumentError, match="engine='cusparselt' can't be had"):
        slope_fx.compile(models.gpt2(), engine="cusparselt")


def test_which_devices_the_library_serves(monkeypatch):
    """Sparse tensor cores, and one device a process: PyTorch's handle is bound to the first."""
    capability = {"cuda:0": (7, 5), "cuda:1": (9, 0), "cuda:2": (8, 0)}
    monkeypatch.setattr(library, "_homes", [])
    monkeypatch.setattr(library, "unavailable", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability[str(d)])
    why_not = library.why_not.__wrapped__
    assert "NVIDIA GPUs, not on cpu" in why_not(CPU)
    assert "cuda:0 has compute capability 7.5, and sparse tensor" in why_not(torch.device("cuda:0"))
    assert why_not(torch.device("cuda:1")) == ""
    assert "bound to cuda:1" in why_not(torch.device("cuda:2"))
    assert why_not(torch.device("cuda:1")) == ""


@pytest.mark.parametrize(
    ("hip", "built", "gpu", "reason"),
    [
        ("6.0", True, True, "PyTorch is for AMD's"),
        (None, False, True, "built without cuSPARSELt"),
        (None, True, False, "no CUDA device"),
        (None, True, True, ""),
    ],
)
def test_what_the_library_needs(monkeypatch, hip, built, gpu, reason):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert library.unavailable().endswith(reason)
    assert bool(library.unavailable()) == bool(reason)


def test_the_operators_that_it_calls_are_torchs():
    """The names and arguments of the narrow interface, as this PyTorch declares them."""
    aten = torch.ops.aten
    assert [a.name for a in aten._cslt_compress.default._schema.arguments] == ["input"]
    for op in (aten._cslt_sparse_mm, aten._cslt_sparse_mm_search):
        names = [argument.name for argument in op.default._schema.arguments]
        assert names[:3] == ["compressed_A", "dense_B", "bias"]
        assert "transpose_result" in names
    assert "alg_id" in [a.name for a in aten._cslt_sparse_mm.default._schema.arguments]


# --- the algorithm -------------------------------------------------------------------------


def test_the_algorithm_is_searched_once_and_kept_with_the_version(engine, monkeypatch):
    version = "800"
    monkeypatch.setattr(library, "version", lambda: version)
    seconds = {"0": 2.0, str(fake.SEARCHED): 1.0}
    monkeypatch.setattr(racing, "race", lambda runs, _: ({k: seconds[k] for k in runs}, True))
    used = []
    multiply = library.multiply
    monkeypatch.setattr(library, "multiply", lambda *a: (used.append(a[3]), multiply(*a))[1])
    values, forward, _ = layer(Pattern(2, 4), 16, 16, 0)

    def product(tokens):
        engine.sparse_linear(normal((tokens, 16), 1, B16), values, forward, None, 2, 4)

    product(33)
    product(64)  # the same power of two
    assert fake.calls["search"] == 1
    assert used == [fake.SEARCHED] * 2
    engine.forget()
    racing.forget_disk()
    product(40)
    assert fake.calls["search"] == 1  # from disk
    product(65)
    assert fake.calls["search"] == 2
    engine.forget()
    version = "801"
    seconds["0"] = 0.5
    product(40)
    assert fake.calls["search"] == 3
    assert used[-1] == 0  # what the search found isn't taken on trust


# --- operands: never stale -----------------------------------------------------------------


class DataWriter(torch.optim.Optimizer):
    """Writes to ``.data``, as many optimizers do: no version shows it."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad.data, alpha=-0.5)


class Net(nn.Module):
    """Awkward widths; the first linear isn't fed by an embedding, the last not the whole."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def compiled(backend="aot_eager", **more):
    torch.manual_seed(0)
    net = Net().to(B16)
    example = torch.zeros(4, 24, dtype=B16)
    return slope_fx.compile(
        net, example_inputs=example, backend=backend, skip_first=False, skip_head=False, **more
    )


def assert_fresh(net, seed=0):
    """Output and gradients as the formulas have them for the weights as they are now."""
    plain = formulas.formula_model(Net(), net)
    x = normal((5, 24), seed, B16)
    got_x, want_x = x.clone().requires_grad_(), x.double().requires_grad_()
    net.zero_grad()
    got, want = net(got_x), plain(want_x)
    got.float().square().sum().backward()
    want.square().sum().backward()
    for a, b in ((got, want), (got_x.grad, want_x.grad)):
        assert (a.double() - b).abs().max() <= 0.03 * b.abs().max()


def train_step(net, optimizer):
    optimizer.zero_grad()
    net(normal((5, 24), 9, B16)).float().square().sum().backward()
    optimizer.step()


def scaled(net):
    return {k: v * 1.5 if v.is_floating_point() else v for k, v in net.state_dict().items()}


def values_of(net):
    return next(iter(slope_fx.sparse_weights(net).values())).values


def edit(change):
    def apply(net):
        with torch.no_grad():
            change(values_of(net))

    return apply


CHANGES = {
    "in place": edit(lambda v: v.mul_(-2)),
    "one element": edit(lambda v: v[0, 0].add_(8)),
    "by copy": edit(lambda v: v.copy_(v.flip(0))),
    "through a view": edit(lambda v: v.view(-1)[:6].neg_()),
    "through detach": lambda net: values_of(net).detach().mul_(-2),
    "to new memory": lambda net: setattr(values_of(net), "data", values_of(net).data * -2),
    "foreach": edit(lambda v: torch._foreach_mul_([v], -2.0)),
    "init": lambda net: nn.init.normal_(values_of(net)),
    "AdamW": lambda net: train_step(net, torch.optim.AdamW(net.parameters(), lr=0.3)),
    "fused AdamW": lambda net: train_step(
        net, torch.optim.AdamW(net.parameters(), lr=0.3, fused=True)
    ),
    "an optimizer writing to .data": lambda net: train_step(
        net, DataWriter([p for p in net.parameters() if p.requires_grad])
    ),
    "load_state_dict": lambda net: net.load_state_dict(scaled(net)),
    "load_state_dict, assigned": lambda net: net.load_state_dict(scaled(net), assign=True),
    "to fp16 and back": lambda net: net.half().to(B16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_operand_is_stale_after(engine, change):
    net = compiled()
    assert_fresh(net)
    made = fake.calls["compress"]
    assert_fresh(net)
    assert fake.calls["compress"] == made  # kept until something changes
    CHANGES[change](net)
    assert_fresh(net)
    assert fake.calls["compress"] > made


def test_no_operand_is_stale_after_a_compiled_optimizer_step(engine):
    net = compiled()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(normal((5, 24), 9, B16)).float().square().sum().backward()
    before = values_of(net).detach().clone()
    torch.compile(optimizer.step, backend="aot_eager")()
    assert not torch.equal(before, values_of(net))
    assert_fresh(net)


def test_no_operand_is_stale_after_a_new_backward_mask(engine):
    net = compiled()
    schedule = slope_fx.Schedule(net, 4, backward_mask_interval=2)
    weight = next(iter(slope_fx.sparse_weights(net).values()))
    with torch.no_grad():  # so that the masks, when chosen anew, change
        weight.values.copy_(normal(weight.values.shape, 5, B16))
    before = weight.backward_bits.clone()
    for step in range(4):
        assert_fresh(net)
        made = fake.calls["compress"]
        schedule.step()
        assert_fresh(net)
        refreshed = fake.calls["compress"] - made
        # Those of the input gradients alone.
        assert refreshed == (len(slope_fx.sparse_weights(net)) if step % 2 else 0)
    assert not torch.equal(weight.backward_bits, before)


def test_operands_are_made_once_an_optimizer_step(engine):
    """Under gradient accumulation, with a GradScaler that skips a step, and while evaluating."""
    net = compiled(adapter_rank=2)
    layers = len(slope_fx.sparse_weights(net))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    schedule = slope_fx.Schedule(net, 8, adapter_start=0.5, backward_mask_interval=None)
    scaler = torch.amp.GradScaler("cpu")
    x = normal((5, 24), 1, B16).requires_grad_()
    for step in range(8):
        made = fake.calls["compress"]
        for micro in range(3):
            loss = net(x).float().square().sum()
            if step == 5 and micro == 1:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            with torch.no_grad():
                net(x)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
        # After step 5 nothing changed: its gradients weren't finite. The adapter phase begins
        # with step 4, on the same weights.
        assert fake.calls["compress"] - made == (0 if step == 6 else 2 * layers), step
        assert (schedule.phase == "adapter") == (step >= 3)
    assert_fresh(net)


@pytest.fixture
def thrifty(engine, monkeypatch):
    """The engine as it is without a word from the environment."""
    monkeypatch.delenv("SLOPE_FX_KEEP_OPERANDS")
    return engine


def test_operands_are_kept_only_where_they_are_used_again(thrifty):
    """Between two optimizer steps. A weight that isn't stepped keeps none."""
    net, other = compiled(), compiled()
    layers = len(slope_fx.sparse_weights(net))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    x = normal((5, 24), 1, B16).requires_grad_()
    with torch.no_grad():
        for _ in range(3):
            other(x)
    assert fake.calls["compress"] == 3 * layers
    # By step: micro-batches, then operands made in units of the layers (one forward, one for the
    # input gradient), and whether some are kept when the step begins.
    expected = [
        (1, 2, False),
        (3, 4, True),  # learnt, and kept from the second on
        (3, 2, True),
        (3, 2, True),
        (1, 2, True),  # kept in vain
        (1, 2, False),
        (3, 4, True),
    ]
    for micros, made, kept in expected:
        before = fake.calls["compress"]
        for _ in range(micros):
            net(x).float().square().sum().backward()
        assert fake.calls["compress"] - before == made * layers
        assert (thrifty.operands.nbytes() > 0) == kept
        optimizer.step()
        optimizer.zero_grad()
        assert thrifty.operands.nbytes() == 0
    assert_fresh(net)


@pytest.mark.parametrize("change", ["in place", "AdamW", "an optimizer writing to .data"])
def test_what_is_kept_by_experience_is_not_stale_either(thrifty, change):
    net = compiled()
    train_step(net, torch.optim.SGD(net.parameters(), lr=0.01))
    for _ in range(3):
        assert_fresh(net)
    assert thrifty.operands.nbytes() > 0
    CHANGES[change](net)
    assert_fresh(net)
    assert_fresh(net)


@pytest.mark.parametrize(("value", "kept"), [("1", True), ("0", False)])
def test_the_environment_overrules(engine, monkeypatch, value, kept):
    monkeypatch.setenv("SLOPE_FX_KEEP_OPERANDS", value)
    net = compiled()
    train_step(net, torch.optim.SGD(net.parameters(), lr=0.01))
    for _ in range(3):
        assert_fresh(net)
    assert (engine.operands.nbytes() > 0) == kept
    monkeypatch.setenv("SLOPE_FX_KEEP_OPERANDS", "yes")
    with pytest.raises(slope_fx.errors.ArgumentError, match=r"KEEP_OPERANDS='yes'; allowed are 1"):
        engine.sparse_linear(torch.zeros(1, 16, dtype=B16), *layer(Pattern(2, 4), 16, 16, 0)[:2],
                             None, 2, 4)  # fmt: skip


@pytest.mark.parametrize("kind", ["autocast", "checkpoint"])
def test_operands_are_kept_through(engine, kind):
    """What stands between the parameter and the op, and could hide that it is the same."""
    torch.manual_seed(0)
    model = models.llama()
    model = model if kind == "autocast" else model.to(B16)
    model = slope_fx.compile(model, backend="aot_eager")
    if kind == "checkpoint":
        model.gradient_checkpointing_enable()
        model.train()
    layers = len(slope_fx.sparse_weights(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        made = fake.calls["compress"]
        for _ in range(2):
            with torch.autocast("cpu", dtype=B16, enabled=kind == "autocast"):
                loss = loss_of(model, batch())
            loss.backward()
        assert fake.calls["compress"] - made == 2 * layers
        optimizer.step()
        optimizer.zero_grad()
    assert all(row.reason == "" for row in slope_fx.explain(model).sparse)


@pytest.mark.inductor
def test_operands_are_kept_through_inductor(engine):
    net = compiled("inductor")
    for _ in range(2):
        assert_fresh(net)
    assert fake.calls["compress"] == 2 * len(slope_fx.sparse_weights(net))
    CHANGES["fused AdamW"](net)
    assert_fresh(net)


def test_both_phases_against_the_formulas(engine):
    torch.manual_seed(0)
    start = models.llama()
    model = slope_fx.compile(copy.deepcopy(start).to(B16), adapter_rank=2, backend="aot_eager")
    schedule = slope_fx.Schedule(model, 4, adapter_start=0.5, backward_mask_interval=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(4):
        plain = formulas.formula_model(start, model)
        optimizer.zero_grad()
        got, want = loss_of(model, batch(step)), loss_of(plain, batch(step))
        got.backward()
        want.backward()
        torch.testing.assert_close(got.double(), want.double(), rtol=0.01, atol=0)
        formulas.assert_gradients_match(model, plain, rtol=0.05)
        optimizer.step()
        schedule.step()


def test_a_teacher_that_follows_by_data_is_not_stale(engine):
    """It is frozen, and written to with nothing to show for it, right after a step."""
    teacher, student = compiled().requires_grad_(False), compiled()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    x = normal((5, 24), 1, B16)
    for _ in range(2):
        with torch.no_grad():
            got, want = teacher(x), formulas.formula_model(Net(), teacher)(x.double())
        assert (got.double() - want).abs().max() <= 0.03 * want.abs().max()
        train_step(student, optimizer)
        for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            if theirs.requires_grad:
                mine.data.mul_(0.5).add_(theirs.data, alpha=2.0)


class TwoEvaluations(torch.optim.Optimizer):
    """Evaluates twice within a step, with a write to ``.data`` between, as SAM does."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure):
        closure()
        for p in self.param_groups[0]["params"]:
            p.data.mul_(-1.5)
        return closure()


@pytest.mark.parametrize("keep", ["1", ""])
def test_no_operand_is_stale_within_a_step(engine, monkeypatch, keep):
    monkeypatch.setenv("SLOPE_FX_KEEP_OPERANDS", keep)
    net = compiled()
    optimizer = TwoEvaluations([p for p in net.parameters() if p.requires_grad])
    for _ in range(2):
        for _ in range(3):
            assert_fresh(net)
        optimizer.step(lambda: assert_fresh(net))


def test_a_step_that_fails_does_no_harm(engine):
    net = compiled()

    def fail():
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        return optimizer

    assert_fresh(net)
    optimizer = fail()
    assert_fresh(net)
    assert engine.operands.nbytes() == 0  # it may still be in its step, for all that is known
    train_step(net, optimizer)
    assert_fresh(net)
    assert engine.operands.nbytes() > 0
    fail()  # and is gone
    gc.collect()
    assert_fresh(net)
    assert engine.operands.nbytes() > 0


def test_evaluating_other_weights_in_their_place_leaves_nothing_stale(thrifty):
    """The way of an exponential moving average: through ``.data``, there and back."""
    net = compiled()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    x = normal((5, 24), 1, B16)
    trained = [p for p in net.parameters() if p.requires_grad]
    train_step(net, optimizer)
    for _ in range(2):
        for _ in range(3):
            assert_fresh(net)
        assert thrifty.operands.nbytes() > 0
        mine = [p.detach().clone() for p in trained]  # amid the micro-batches, even
        for p in trained:
            p.data.mul_(-1.5)
        with torch.no_grad():
            got, want = net(x), formulas.formula_model(Net(), net)(x.double())
        assert (got.double() - want).abs().max() <= 0.03 * want.abs().max()
        for p, value in zip(trained, mine, strict=True):
            p.data.copy_(value)
        assert_fresh(net)
        train_step(net, optimizer)


def test_weights_stepped_by_a_cuda_graph_keep_nothing(engine, monkeypatch):
    """A replay calls no hook."""
    net = compiled()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert_fresh(net)
    with monkeypatch.context() as patch:
        patch.setattr(operands, "_capturing", lambda: True)
        train_step(net, optimizer)
    for _ in range(2):
        assert_fresh(net)
    assert engine.operands.nbytes() == 0


def test_an_operand_made_while_another_thread_steps_is_not_kept(engine):
    values, forward, _ = layer(Pattern(2, 4), 16, 16, 0)
    values.requires_grad_()
    optimizer = DataWriter([values])
    values.grad = torch.ones_like(values)

    def make():
        operand = values.detach().clone()
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join(timeout=20)
        assert not thread.is_alive()
        return operand

    kept = engine.operands
    kept.get(values, (forward,), ("x",), lambda: values.detach().clone(), training=True)
    before = kept.get(values, (forward,), ("y",), make, training=True)
    assert not torch.equal(before, values)
    after = kept.get(values, (forward,), ("y",), lambda: values.detach().clone(), training=True)
    assert torch.equal(after, values)


def test_masks_in_other_memory_are_other_masks(engine):
    values, forward, _ = layer(Pattern(2, 4), 16, 16, 0)
    _, other, _ = layer(Pattern(2, 4), 16, 16, 1)
    x = normal((3, 16), 1, B16)
    engine.sparse_linear(x, values, forward, None, 2, 4)
    forward.data = other
    y = engine.sparse_linear(x, values, forward, None, 2, 4)
    want = x.double() @ reference.expand(values, other, 2, 4).double().t()
    torch.testing.assert_close(y.double(), want, rtol=0.02, atol=0.02)
    alias = forward.data
    engine.sparse_linear(x, values, alias, None, 2, 4)
    forward.data.copy_(forward.flip(0))  # unseen
    made = fake.calls["compress"]
    engine.sparse_linear(x, values, forward.data, None, 2, 4)  # another tensor, the same version
    assert fake.calls["compress"] == made + 1


def test_what_is_of_other_values_goes_at_once(engine):
    """Whatever it was for: a model that changes its dtype must not drag the old operands along."""
    values, forward, _ = layer(Pattern(2, 4), 16, 32, 0)
    engine.sparse_linear(normal((3, 32), 1, B16), values, forward, None, 2, 4)
    one = engine.operands.nbytes(values)
    assert one == 16 * 32 * 2 * 9 // 16
    values.data = values.data.half()
    engine.sparse_linear(normal((3, 32), 1, torch.float16), values, forward, None, 2, 4)
    assert engine.operands.nbytes(values) == one


def test_memory_that_was_given_back_is_noticed_at_the_next_use_of_another(engine):
    (values, forward, _), (other, mask, _) = (layer(Pattern(2, 4), 16, 16, s) for s in (0, 1))
    x = normal((3, 16), 1, B16)
    engine.sparse_linear(x, values, forward, None, 2, 4)
    before, storage = values.clone(), values.untyped_storage()
    with torch.autograd._unsafe_preserve_version_counter(values):
        size = storage.nbytes()
        storage.resize_(0)
        engine.sparse_linear(x, other, mask, None, 2, 4)
        storage.resize_(size)
        values.copy_(-before)
    assert engine.operands.nbytes(values) == 0
    for _ in range(2):
        y = engine.sparse_linear(x, values, forward, None, 2, 4)
    want = x.double() @ reference.expand(-before, forward, 2, 4).double().t()
    torch.testing.assert_close(y.double(), want, rtol=0.02, atol=0.02)
    assert engine.operands.nbytes(values) == 0
    assert engine.operands.nbytes(other) > 0


def test_operands_are_counted_and_go_with_the_weights(engine):
    net = compiled()
    assert slope_fx.explain(net).sparse[0].operand_bytes == 0
    assert_fresh(net)
    report = slope_fx.explain(net)
    # Padded to multiples of 16, 9/16 of the dense bf16 weight, forward and backward.
    sizes = [tuple(-(-s // 16) * 16 for s in r.shape) for r in report.sparse]
    want = [2 * 2 * a * b * 9 // 16 for a, b in sizes]
    assert [r.operand_bytes for r in report.sparse] == want
    assert "of operands that they made of the weights" in str(report)
    assert slope_fx.report.Explanation.from_dict(report.to_dict()) == report
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(engine.operands.nbytes()))
    optimizer.step()
    assert seen == [0]  # the step has their memory
    twin = copy.deepcopy(net)
    assert_fresh(twin)
    assert_fresh(net)
    assert engine.operands.nbytes() == 2 * sum(want)
    del net, twin, optimizer
    torch._dynamo.reset()
    gc.collect()
    assert engine.operands.nbytes() == 0
    assert len(engine.operands._weights) == 0


def test_writes_that_nothing_shows_can_be_told(engine):
    net = compiled()
    assert_fresh(net)
    values_of(net).data.mul_(-2)
    slope_fx.weights_changed(net)
    assert engine.operands.nbytes() == 0
    assert_fresh(net)
    with pytest.raises(slope_fx.errors.StateError):
        slope_fx.weights_changed(nn.Linear(4, 4))


def test_a_model_that_moves_leaves_no_operands_behind(engine):
    net = compiled()
    assert_fresh(net)
    assert engine.operands.nbytes() > 0
    net.to("meta")
    assert engine.operands.nbytes() == 0


def test_inference_tensors_are_not_kept_and_that_is_said(engine):
    operands._say_inference.cache_clear()
    with torch.inference_mode():
        values, forward, _ = layer(Pattern(2, 4), 16, 16, 0)
        x = normal((3, 16), 1, B16)
        with pytest.warns(
            slope_fx.errors.EngineWarning, match="no effect on weights that are inference"
        ):
            engine.sparse_linear(x, values, forward, None, 2, 4)
        values.neg_()
        y = engine.sparse_linear(x, values, forward, None, 2, 4)
        want = x.double() @ reference.expand(values, forward, 2, 4).double().t()
    torch.testing.assert_close(y.double(), want, rtol=0.02, atol=0.02)
    assert engine.operands.nbytes() == 0


def test_nothing_is_kept_or_searched_for_a_cuda_graph(engine, monkeypatch):
    monkeypatch.setattr(operands, "replayed", lambda device: True)
    monkeypatch.setattr(racing, "can_measure", lambda device: False)
    values, forward, _ = layer(Pattern(2, 4), 16, 16, 0)
    for _ in range(2):
        engine.sparse_linear(normal((3, 16), 1, B16), values, forward, None, 2, 4)
    assert fake.calls["compress"] == 2
    assert fake.calls["search"] == 0
    assert engine.operands.nbytes(values) == 0


def test_inductors_cuda_graphs_are_noticed(monkeypatch):
    from torch._inductor import cudagraph_trees as trees

    manager = trees.CUDAGraphTreeManager.__new__(trees.CUDAGraphTreeManager)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        trees, "get_manager", lambda index, create_if_none_exists: manager if index == 1 else None
    )
    for state in trees.ExecutionState:
        manager.path_state = state
        expected = state in (trees.ExecutionState.WARMUP, trees.ExecutionState.RECORDING)
        assert operands.replayed(torch.device("cuda", 1)) == expected
        assert not operands.replayed(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert operands.replayed(torch.device("cuda", 0))


def test_each_stream_has_its_own(engine, monkeypatch):
    streams = iter([1, 2, 1, 2])
    monkeypatch.setattr(operands, "_stream", lambda device: next(streams))
    values, forward, _ = layer(Pattern(2, 4), 16, 16, 0)
    for _ in range(4):
        engine.sparse_linear(normal((3, 16), 1, B16), values, forward, None, 2, 4)
    assert fake.calls["compress"] == 2


def test_threads_share_them(engine):
    values, forward, backward = layer(Pattern(2, 4), 32, 32, 0)
    want = DenseOracle.of(values, forward, backward, 2, 4)
    wrong = []

    def work(seed):
        for _ in range(20):
            x = normal((3, 32), seed, B16)
            y = engine.sparse_linear(x, values, forward, None, 2, 4)
            bound = want.forward(x)
            if ((y.double() - bound[0]).abs() > 0.05 * bound[1]).any():
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong
    assert fake.calls["compress"] <= len(threads)


def test_values_whose_memory_comes_and_goes_are_not_kept(engine, monkeypatch, tmp_path):
    """FSDP2 gathers a weight into the same tensor, with the same version, at each use."""
    start = slope_fx.compile(models.gpt2().to(B16), backend="aot_eager")

    def losses(keep):
        monkeypatch.setenv("SLOPE_FX_KEEP_OPERANDS", keep)
        model = copy.deepcopy(start)
        mesh = init_device_mesh("cpu", (1,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        found = []
        for step in range(4):
            for factor in (0.9, 1.2):  # written to without a step: only the shards' versions change
                with torch.no_grad():
                    for p in model.parameters():
                        if p.requires_grad:
                            p.mul_(factor)
                    found.append(loss_of(model, batch()).item())
            if step > 1:
                loss = loss_of(model, batch(step))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
        return found, len(slope_fx.sparse_weights(model))

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        want, _ = losses("0")
        got, layers = losses("1")
    finally:
        dist.destroy_process_group()
    assert got == want
    assert len(set(want)) == len(want)
    known = list(engine.operands._weights.values())
    assert len(known) == layers
    assert all(weight.passing and not weight.kept for weight in known)


# --- the choice ----------------------------------------------------------------------------


@pytest.fixture
def race(engine, monkeypatch):
    """cusparselt against cpu-dense, with made-up times."""
    monkeypatch.setenv("SLOPE_FX_ENGINES", "cpu-dense,cusparselt")
    seconds = {"cpu-dense": 2.0, "cusparselt": 1.0, "plain": 1.5, "0": 2.0, str(fake.SEARCHED): 1.0}

    def run(runs, device):
        for thunk in runs.values():
            thunk()
            thunk()
        return {name: seconds[name] for name in runs}, True

    monkeypatch.setattr(racing, "race", run)
    return seconds


@pytest.mark.parametrize("policy", ["", "0", "1"])
def test_making_the_operand_is_part_of_the_price(race, monkeypatch, policy):
    """Unless it will be kept for good."""
    monkeypatch.setenv("SLOPE_FX_KEEP_OPERANDS", policy)
    chosen = {}
    for trains in (True, False):
        selection.forget()
        anew = trains or policy != "1"
        before = fake.calls["compress"]
        chosen[trains] = selection.choose(
            "sparse_linear", 8, (32, 16), 2, 4, B16, CPU, trains=trains
        )
        # The race runs it twice, after once for trying whether it can be run.
        assert fake.calls["compress"] - before == (3 if anew else 1)
        assert [p.anew for p, _ in selection.choices(32, 32, 2, 4)] == [anew]
    assert set(chosen.values()) == {"cusparselt"}


def test_forward_and_backward_are_chosen_separately(race):
    race["cusparselt"] = 1.0
    assert selection.choose("sparse_linear", 8, (32, 16), 2, 4, B16, CPU) == "cusparselt"
    race["cusparselt"] = 3.0
    assert selection.choose("sparse_input_grad", 8, (32, 16), 2, 4, B16, CPU) == "cpu-dense"
    assert selection.choose("sparse_weight_grad", 8, (32, 16), 2, 4, B16, CPU) == "cpu-dense"


def test_what_the_library_refuses_is_not_chosen_and_that_is_said(race, monkeypatch):
    def refuse(*_):
        raise RuntimeError("CUDA error: operation not supported when calling `cusparseLtMatmul`")

    monkeypatch.setattr(library, "multiply", refuse)
    engines.say_once.cache_clear()
    with pytest.warns(
        slope_fx.errors.EngineWarning, match="is not used for sparse_linear of 32x32, 8 to"
    ):
        assert selection.choose("sparse_linear", 8, (32, 16), 2, 4, B16, CPU) == "cpu-dense"


def test_wider_values_are_another_problem(race):
    for dtype in (None, torch.float32):
        selection.choose("sparse_linear", 8, (32, 16), 2, 4, B16, CPU, values_dtype=dtype)
    assert [p.values_dtype for p, _ in selection.choices(32, 32, 2, 4)] == ["", "float32"]


def test_explain_names_engine_and_gain_of_each_product(race):
    net = compiled()
    net(normal((5, 24), 0, B16).requires_grad_()).sum().backward()
    text = str(slope_fx.explain(net))
    # The weight gradient has one candidate here, which nothing was measured against.
    assert text.count("cusparselt 1.50x 1.50x cpu-dense  ") == 3


@pytest.mark.parametrize(("seconds", "told"), [(3.0, True), (0.5, False)])
def test_a_model_too_small_to_gain_is_told_in_one_line(race, seconds, told):
    race["cusparselt"] = race["cpu-dense"] = seconds
    slope_fx.rewriting_backend("aot_eager")._told.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = compiled()
        x = normal((5, 24), 0, B16)
        net(x.requires_grad_()).sum().backward()
        with torch.no_grad():
            net(x)
    lines = [str(w.message) for w in caught if "too small to gain" in str(w.message)]
    assert len(lines) == int(told)
    assert ("at best 0.50x, for 8 tokens" in str(slope_fx.explain(net))) == told
    if told:
        assert slope_fx.explain(net).note == lines[0]
        assert "\n" not in lines[0]
