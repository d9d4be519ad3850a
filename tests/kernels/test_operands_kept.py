"""Which operands are kept, how long, and how much memory they take."""

import contextlib
import copy
import gc
import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fake_cusparselt as fake
import models
import slope_fx
from models import batch, loss_of
from operand_models import (
    B16,
    CHANGES,
    DataWriter,
    assert_fresh,
    compiled,
    layer,
    train_step,
)
from oracle import DenseOracle
from slope_fx.errors import ArgumentError, EngineWarning
from slope_fx.kernels import operands, racing, reference
from slope_fx.planning.patterns import Pattern
from strategies import normal


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


@pytest.mark.parametrize(("value", "kept"), [("1", True), ("0", False)])
def test_the_environment_overrules(engine, monkeypatch, value, kept):
    monkeypatch.setenv("SLOPE_FX_KEEP_OPERANDS", value)
    net = compiled()
    train_step(net, torch.optim.SGD(net.parameters(), lr=0.01))
    for _ in range(3):
        assert_fresh(net)
    assert (engine.operands.nbytes() > 0) == kept
    monkeypatch.setenv("SLOPE_FX_KEEP_OPERANDS", "yes")
    with pytest.raises(ArgumentError, match=r"KEEP_OPERANDS='yes'; allowed are 1"):
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
        with pytest.warns(EngineWarning, match="no effect on weights that are inference"):
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


@pytest.mark.full
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
