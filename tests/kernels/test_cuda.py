"""What only a GPU can show: streams, graphs, several devices, measured choices, the sanitizer.

``make gpu`` runs these, with ``test_triton_*.py`` on the GPU, and then the benchmarks.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import models
import slope_fx
from oracle import DenseOracle, assert_same, assert_within_rounding
from slope_fx.kernels import engines, racing, selection
from slope_fx.kernels.selection import Request
from strategies import normal

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
F16 = torch.bfloat16
triton = engines.ENGINES["triton"]


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing chosen or tuned, in memory or on disk, and no limit on the engines.

    Races count as quiet, though other tests share the GPU, so that their results are kept.
    """
    from slope_fx.kernels.triton import tuning

    monkeypatch.setenv("SLOPE_FX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SLOPE_FX_ENGINES")
    monkeypatch.setattr(racing, "_QUIET", float("inf"))

    def forget():
        selection.forget()
        engines.ENGINES["cusparselt"].forget()
        tuning.forget()
        racing.forget_disk()

    forget()
    yield forget
    forget()


def candidates(op):
    """The engines that compete for a product in bf16 on this GPU."""
    able = {"triton", "triton-dense"}
    if op != "sparse_weight_grad" and not engines.ENGINES["cusparselt"].unavailable():
        able.add("cusparselt")
    return able


def layer(d_out=256, d_in=512, device="cuda", dtype=F16):
    weight = normal((d_out, d_in), 0, dtype).to(device)
    forward = triton.magnitude_mask(weight, 2, 4)
    values = triton.compress(weight, forward, 2, 4)
    return values, forward, triton.backward_mask(values, forward, 2, 4)


def test_engines_are_chosen_by_events_and_kept(fresh, monkeypatch):
    values, _, _ = layer()
    device = values.device

    def chosen(op):
        return selection.choose(op, Request(64, 256, 512, 2, 4, F16, device))

    first = {op: chosen(op) for op in selection.PRODUCTS}
    assert all(engine in candidates(op) for op, engine in first.items())
    for (problem, *_), choice in selection._made.items():
        assert problem.threads == 0
        assert set(choice.seconds) == {*candidates(problem.op), "plain"}
        assert all(1e-7 < seconds < 1 for seconds in choice.seconds.values())
    fresh()
    measured = []
    monkeypatch.setattr(racing, "race", lambda runs, device: measured.append(runs) or 1 / 0)
    assert {op: chosen(op) for op in selection.PRODUCTS} == first
    assert not measured


def test_tile_sizes_are_measured_once_and_kept(fresh, monkeypatch):
    values, forward, _ = layer()
    x = normal((8, 512), 1, F16).cuda()
    triton.sparse_linear(x, values, forward, None, 2, 4)
    monkeypatch.setattr(racing, "race", lambda runs, device: 1 / 0)
    triton.sparse_linear(x, values, forward, None, 2, 4)  # from memory
    assert any('"linear"' in entry for entry in racing._read(racing._store(x.device)))


def test_kernels_run_on_the_current_stream():
    values, forward, backward = layer()
    oracle = DenseOracle.of(values, forward, backward, 2, 4)
    x = torch.full((7, 512), float("nan"), dtype=F16, device="cuda")
    want = normal((7, 512), 1, F16)
    late = want.cuda()
    triton.sparse_linear(x, values, forward, None, 2, 4)  # compiled and tuned before
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the input is late on this stream alone
        x.copy_(late)
        y = triton.sparse_linear(x, values, forward, None, 2, 4)
    stream.synchronize()
    assert_within_rounding(y, *oracle.forward(want), F16)


def test_a_cuda_graph_captures_what_was_never_tuned(fresh):
    """Nothing can be measured then; the usual configuration serves, and isn't remembered."""
    values, forward, backward = layer()
    x, grad = normal((9, 512), 1, F16).cuda(), normal((9, 256), 2, F16).cuda()

    def products():
        return (
            triton.sparse_linear(x, values, forward, None, 2, 4),
            triton.sparse_input_grad(grad, values, forward, backward, 2, 4),
            triton.sparse_weight_grad(grad, x, forward, 2, 4),
        )

    eager = products()  # compiles; a capture would not allow the loading of a kernel
    fresh()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = products()
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    for got, want, factor in zip(captured, eager, (2, 1, 2), strict=True):
        torch.testing.assert_close(got, want * factor, rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_model_trains_through_inductor(fresh, mode):
    """With CUDA graphs and without, as the dense engine trains it."""

    def train(engine):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = models.gpt2().cuda()
        model = slope_fx.compile(model, adapter_rank=4, engine=engine)
        schedule = slope_fx.Schedule(model, total_steps=6, adapter_start=0.5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        ids = torch.arange(48, device="cuda").view(4, 12)
        losses = []
        for _ in range(6):
            with torch.autocast("cuda", dtype=F16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step(), optimizer.zero_grad(), schedule.step()
        return losses

    with torch._inductor.config.patch("triton.cudagraphs", mode is not None):
        losses = train("auto")
        assert losses == pytest.approx(train("dense"), rel=2e-2)
    assert losses[-1] < losses[0]


def test_explain_names_the_engines_of_the_gpu(fresh):
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).cuda()
    x = torch.randn(32, 64, device="cuda")
    model = slope_fx.compile(model, example_inputs=x, skip_first=False, skip_head=False)
    model(x).sum().backward()
    for report in slope_fx.explain(model).sparse:
        assert {p.engine for p in report.products} <= {"triton", "triton-dense"}
        assert all(p.speedup for p in report.products)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_another_device_than_the_current_one():
    values, forward, backward = layer(device="cuda:1")
    oracle = DenseOracle.of(values, forward, backward, 2, 4)
    x = normal((7, 512), 1, F16)
    assert torch.cuda.current_device() == 0
    y = triton.sparse_linear(x.to("cuda:1"), values, forward, None, 2, 4)
    assert y.device == torch.device("cuda:1")
    assert_within_rounding(y, *oracle.forward(x), F16)


def test_results_repeat_bit_for_bit():
    values, forward, backward = layer(1024, 2048)
    x, grad = normal((300, 2048), 1, F16).cuda(), normal((300, 1024), 2, F16).cuda()
    first = None
    for _ in range(5):
        now = (
            triton.sparse_linear(x[:3], values, forward, None, 2, 4),
            triton.sparse_input_grad(grad, values, forward, backward, 2, 4),
            triton.sparse_weight_grad(grad, x, forward, 2, 4),
        )
        first = first or now
        for a, b in zip(now, first, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("values", ["float", "int8", "int4"])
def test_a_frozen_model_moves_to_the_gpu(values):
    """It was frozen on the CPU; the logits are those of the dense model there and here."""
    model = slope_fx.freeze(models.awake(models.llama()), values=values, dtype="bfloat16")
    ids = models.batch(1)
    with torch.no_grad():
        want = slope_fx.densify(model).double()(ids).logits
        for device in ("cpu", "cuda", "cpu"):
            got = model.to(device)(ids.to(device)).logits.cpu().double()
            assert (got - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="no compute-sanitizer here")
def test_no_kernel_touches_memory_that_is_not_its_own():
    script = Path(__file__).parents[1] / "helpers" / "launch_kernels.py"
    done = subprocess.run(
        ["compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no",
         sys.executable, str(script)],
        # Each tensor an allocation of its own, or one's end would be in the middle of another.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "configurations of kernels launched" in done.stdout
