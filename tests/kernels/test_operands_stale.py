"""A kept operand is never used after its weight changed, in whatever way."""

import copy
import gc

import pytest
import torch

import fake_cusparselt as fake
import formulas
import models
import slope_fx
from models import batch, loss_of
from operand_models import (
    B16,
    CHANGES,
    Net,
    assert_fresh,
    compiled,
    layer,
    train_step,
    values_of,
)
from slope_fx.kernels import reference
from slope_fx.planning.patterns import Pattern
from strategies import normal


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


def test_writes_that_nothing_shows_can_be_told(engine):
    net = compiled()
    assert_fresh(net)
    values_of(net).data.mul_(-2)
    for weight in slope_fx.sparse_weights(net).values():
        weight.note_write()
    assert engine.operands.nbytes() == 0
    assert_fresh(net)
