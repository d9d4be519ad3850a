"""Whole models: trained in both phases, held against the formulas, recompiled once."""

import copy

import pytest
import torch

import models
import slope_fx
from formulas import assert_gradients_match, formula_model
from models import batch, loss_of


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "gpt2" else pytest.mark.full) for n in models.TRANSFORMERS],
)
def test_trains_in_both_phases_as_the_formulas_do(name, backend):
    """20 steps, adapters from the tenth: the loss falls, one recompile, gradients agree."""
    dense = models.TRANSFORMERS[name](layers=3)
    model = slope_fx.compile(
        copy.deepcopy(dense), "2:4", adapter_rank=0.1, backend="aot_eager", region="model",
        on_fallback="error",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = slope_fx.Schedule(model, 20, adapter_start=0.5, backward_mask_interval=5)
    losses, compiles = [], []
    ids = batch()
    for step in range(20):
        loss = loss_of(model, ids)
        loss.backward()
        if step in (0, 9, 10, 19):
            reference = formula_model(dense, model)
            want = loss_of(reference, ids)
            want.backward()
            assert loss.item() == pytest.approx(want.item(), rel=1e-5)
            assert_gradients_match(model, reference, rtol=2e-4)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        compiles.append(backend.graphs)
    assert losses[-1] < losses[10] < losses[0]
    assert compiles == [1] * 10 + [2] * 10
    for weight in slope_fx.sparse_weights(model).values():
        assert weight.lora_B.abs().sum() > 0


def test_identical_blocks_compile_once(backend):
    """12 blocks compiled one by one: one graph, and one more at the adapter phase."""
    model = models.gpt2(layers=12)
    slope_fx.compile(model, adapter_rank=2, backend=None, skip_first=False, on_fallback="error")
    for block in model.transformer.h:
        block.compile(backend=backend)
    schedule = slope_fx.Schedule(model, 2, adapter_start=0.5)
    ids = batch()
    for step in (1, 2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert backend.graphs == step
        schedule.step()


@pytest.mark.parametrize(
    "name",
    [n if n == "llama" else pytest.param(n, marks=pytest.mark.full) for n in models.TRANSFORMERS],
)
def test_blocks_as_regions(name, backend):
    """The same gradients from blocks as from the whole; a copy keeps its regions."""
    dense = models.TRANSFORMERS[name](layers=3)
    model = slope_fx.compile(
        copy.deepcopy(dense), adapter_rank=2, backend="aot_eager", region="blocks",
        on_fallback="error",
    )  # fmt: skip
    slope_fx.Schedule(model, 1, adapter_start=0.0)
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_B.data.normal_(std=0.1)
    copied = copy.deepcopy(model)
    reference = formula_model(dense, model)
    ids = batch()
    more = {} if name == "bert" else {"use_cache": False}
    reference(input_ids=ids, labels=ids, **more).loss.backward()
    for each in (model, copied):
        each(input_ids=ids, labels=ids, **more).loss.backward()
        assert_gradients_match(each, reference, rtol=2e-4)
    # The first block differs from the rest (its inputs stay dense), and a linear may
    # stand outside of the blocks.
    assert backend.graphs <= 3


@pytest.mark.parametrize(
    "reentrant",
    [
        pytest.param(False, id="non-reentrant", marks=pytest.mark.full),
        pytest.param(True, id="reentrant"),
    ],
)
def test_activation_checkpointing(reentrant):
    dense = models.gpt2(layers=3)
    model = copy.deepcopy(dense)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    slope_fx.compile(model, backend="aot_eager", on_fallback="error")
    reference = formula_model(dense, model)
    ids = batch()
    loss_of(reference, ids).backward()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert_gradients_match(model, reference, rtol=2e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
        pytest.param(
            lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, foreach=True),
            marks=pytest.mark.full,
        ),
        pytest.param(
            lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, fused=True),
            marks=pytest.mark.full,
        ),
        pytest.param(
            lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.5),
            marks=pytest.mark.full,
        ),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),
    ],
    ids=["AdamW", "foreach", "fused", "SGD", "Adafactor"],
)
def test_optimizers_and_accumulation_leave_masks_and_sleeping_adapters_alone(make):
    model = models.gpt2()
    slope_fx.compile(model, adapter_rank=2, backend="eager", on_fallback="error")
    weights = slope_fx.sparse_weights(model)
    before = {n: copy.deepcopy(w.state_dict()) for n, w in weights.items()}
    values = {n: w.values.detach().clone() for n, w in weights.items()}
    optimizer = make(model.parameters())
    for _ in range(2):
        for part in batch().split(1):
            (loss_of(model, part) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in weights.items():
        for key, value in weight.state_dict().items():
            assert torch.equal(value, before[name][key]), key
        assert not torch.equal(weight.values, values[name])


def test_an_average_of_weights_keeps_the_masks():
    """torch's AveragedModel, with its plain average, leaves equal bytes equal."""
    model = slope_fx.compile(models.gpt2(), backend="eager", on_fallback="error")
    averaged = torch.optim.swa_utils.AveragedModel(model)
    ids = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
    for name, weight in slope_fx.sparse_weights(averaged.module).items():
        assert torch.equal(weight.forward_bits, slope_fx.sparse_weights(model)[name].forward_bits)
    assert averaged(input_ids=ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("width", [32, 36], ids=["whole bytes", "padded rows"])
def test_an_average_that_changes_the_masks_is_an_error_not_a_wrong_model(width):
    """An average of one's own truncates bytes; what it leaves isn't N:M, and no engine takes it."""
    layers = [torch.nn.Linear(width, width) for _ in range(4)]
    model, x = torch.nn.Sequential(*layers), torch.randn(2, width)
    slope_fx.compile(model, example_inputs=x, backend="eager")
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        for average, parameter in zip(averaged.parameters(), model.parameters(), strict=True):
            if not average.is_floating_point():
                with pytest.raises(slope_fx.errors.UnsupportedError, match="of a mask"):
                    average.copy_(0.9 * average + 0.1 * parameter)
            average.copy_(0.9 * average.data + 0.1 * parameter.data)
    with pytest.raises(ValueError, match="A forward mask is no longer 2:4"):
        averaged(x)
    trained = [p for p in averaged.parameters() if p.requires_grad]
    assert len(trained) == 8
