"""One answer on every road: the part of ``consistency.py`` that each run of the tests does.

Each op, pass and engine once through Inductor, with adapters that are as large as the weights;
GPT-2 on all roads, every other architecture on one.
"""

import json

import pytest
import torch

import consistency
import slope_fx
from architectures import cast
from consistency import CHOSEN, cells
from consistency_checks import (
    against_oracle,
    all_gradient_errors,
    batches_of,
    compare,
    worst,
)
from consistency_checks import (
    run as run_model,
)
from consistency_subject import Subject
from slope_fx.passes import NAMES, run

CHOOSING = {"compress", "magnitude_mask", "backward_mask"}
"""Ops that are called when a weight is made and when its mask is chosen anew, not in a graph."""
PRODUCTS = {"sparse_linear", "sparse_input_grad", "sparse_weight_grad"}
OWN = "torch: weights of its own"


def agree(architecture, phase, dtype, road, cases):
    found = list(cells(architecture, phase, dtype, road, cases))
    assert not [cell.wrong for cell in found if cell.wrong]
    assert all(cell.errors and not cell.outcome for cell in found)


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("phase", "cases"),
    [
        pytest.param("sparse", ("train", "eval", "steps"), marks=pytest.mark.full),
        ("adapter", ("train", "steps")),
        pytest.param(
            "adapter",
            ("eval", "one token", "accumulation", "checkpoint around, reentrant",
             "checkpoint around, non-reentrant"),
            marks=pytest.mark.full,
        ),
    ],
)  # fmt: skip
def test_gpt2_by_blocks(phase, cases):
    agree("GPT-2", phase, "fp32", "inductor, blocks", cases)


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        pytest.param("GPT-2", "bf16", marks=pytest.mark.full),
        pytest.param(OWN, "autocast", marks=pytest.mark.full),
    ],
)
def test_in_16_bits(architecture, dtype):
    agree(architecture, "adapter", dtype, "inductor, blocks", ("train",))


@pytest.mark.inductor
def test_gpt2_reloaded():
    agree("GPT-2", "adapter", "fp32", "reloaded", ("train", "eval"))


@pytest.mark.parametrize(
    ("road", "cases"),
    [
        ("eager", ("masks", "train", "eval")),
        ("aot_eager", ("train", "steps")),
        ("merged", ("train", "eval")),
        ("PEFT", ("eval",)),
    ],
)
def test_gpt2_on_other_roads(road, cases):
    agree("GPT-2", "adapter", "fp32", road, cases)


# Each op and pass: what is compiled, what of slope_fx must have had a part in it.
GRAPHS = {
    "GPT-2": (
        {"region": "blocks"}, "adapter", "train",
        {"normalize_linears", "insert_adapters", "sparsify_linears"}, PRODUCTS,
    ),
    "Mixtral": ({}, "adapter", "train", {"insert_adapters"}, PRODUCTS),
    "torch: TransformerEncoder": (
        {}, "adapter", "train", {"prune_expands", "decompose_attention"}, PRODUCTS,
    ),
    f"{OWN}, weights expanded": (
        {"disable_passes": ("insert_adapters", "sparsify_linears"), "on_fallback": "ignore"},
        "adapter", "train", set(), {"expand", "expand_grad", "add_adapter"},
    ),
    **{
        f"{OWN}, {engine}": ({"engine": engine}, "adapter", "train", {"insert_adapters"}, PRODUCTS)
        for engine in ("cpu-dense", "dense", "reference")
    },
}  # fmt: skip


COMPILED = {name.partition(",")[0] for name in GRAPHS}


@pytest.mark.parametrize("architecture", [name for name in CHOSEN if name not in COMPILED])
def test_merged(architecture):
    """Of those that ``test_architectures.py`` compiles."""
    agree(architecture, "adapter", "fp32", "merged", ("train",))


def test_all_ops_and_passes_are_covered():
    ops, passes = (set().union(*(graph[i] for graph in GRAPHS.values())) for i in (4, 3))
    # A frozen model has passes of its own: tests/frozen.
    assert passes == set(NAMES) - {"freeze_linears", "join_linears"}
    assert ops | CHOOSING == set(slope_fx.ops.__all__)


SLOW = ("Mixtral", "torch: TransformerEncoder")


@pytest.mark.inductor
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.full if n in SLOW else ()) for n in GRAPHS],
)
def test_each_op_and_pass(name, monkeypatch):
    how, phase, case, passes, ops = GRAPHS[name]
    reports, real = [], run._run_one

    def noted(*args):
        reports.append(real(*args))
        return reports[-1]

    monkeypatch.setattr(run, "_run_one", noted)
    subject = Subject(name.partition(",")[0], phase)
    model = subject.compiled(**how)
    grad, batches = case != "eval", batches_of(subject, case)
    # An expanded weight's input gradient is that of W^R.
    oracle = subject.oracle(once="on_fallback" in how)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = run_model(model.train(grad), batches, grad)
    called = {e.name.removeprefix("slope_fx::") for e in profile.events()}
    assert ops <= called
    errors = compare(
        got, run_model(oracle.train(grad), [cast(b, torch.float64) for b in batches], grad)
    )
    if grad:
        errors["gradients"], _ = worst(all_gradient_errors(model, oracle))
    assert worst(errors)[0] <= consistency.BOUND
    assert passes <= {report.name for report in reports if report.matches}


def lose_scale(model):
    for weight in slope_fx.sparse_weights(model).values():
        weight.scale = 1.0


def lose_bias(model):
    model.transformer.h[1].mlp.c_fc.bias.data.zero_()


def choose_other_masks(model):
    for weight in slope_fx.sparse_weights(model).values():
        other = torch.randn_like(weight.values)
        bits = slope_fx.ops.backward_mask(other, weight.forward_bits, weight.n, weight.m)
        weight.backward_bits.data.copy_(bits)


def swap_adapters(model):
    one, other = (block.attn.c_proj.weight_sparse for block in model.transformer.h)
    one.lora_A.data, other.lora_A.data = other.lora_A.data, one.lora_A.data


@pytest.mark.parametrize(
    ("dtype", "mistakes"),
    [
        ("fp32", (lose_scale, lose_bias, swap_adapters, choose_other_masks)),
        ("bf16", (lose_scale, lose_bias)),
        ("autocast", (lose_scale, swap_adapters)),
    ],
)
def test_mistakes_are_far_out_of_bounds(dtype, mistakes):
    subject = Subject("GPT-2", "adapter", dtype)
    bounds = consistency.bounds_of(subject, "train", {"logits": 0.0, "gradients": 0.0})
    for mistake in mistakes:
        torch._dynamo.reset()
        model = subject.compiled(backend="eager")
        mistake(model)
        errors = against_oracle(subject, model, "train").errors
        assert errors["gradients"] > 3 * bounds["gradients"]
        if mistake is not choose_other_masks:
            assert errors["logits"] > 2 * bounds["logits"]


def test_masks_are_compared():
    subject = Subject("GPT-2", "sparse")
    model = subject.compiled(backend=None)
    assert not consistency.CASES["masks"](subject, model, "masks").errors["masks"]
    weight = next(iter(slope_fx.sparse_weights(model).values()))
    weight.backward_bits.data = weight.backward_bits.roll(1, 0)
    assert consistency.CASES["masks"](subject, model, "masks").errors["masks"] > consistency.BOUND


def test_nothing_in_the_committed_results_is_wrong():
    path = consistency.ROOT / "benchmarks" / "results" / "consistency.json"
    found = [consistency.Cell(**cell) for cell in json.loads(path.read_text())["cells"]]
    assert {cell.architecture for cell in found} == set(CHOSEN)
    assert not [cell for cell in found if cell.wrong]
