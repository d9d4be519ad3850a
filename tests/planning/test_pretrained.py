"""Masks and adapters from a pretrained model, against the papers' formulas in float64."""

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import models
import slope_fx
from forms import EXPERTS, FORMS, WIDTH, Experts, Written
from formulas import top_n_mask
from models import batch
from slope_fx.errors import ArgumentError
from slope_fx.planning.adapters import low_rank
from slope_fx.planning.calibration import observe
from slope_fx.planning.config import SlopeConfig
from slope_fx.planning.patterns import PatternRules
from slope_fx.planning.plan import plan_linears, sparse_plans
from slope_fx.planning.trace import trace
from strategies import normal, seeds

BACKEND = {"backend": "eager", "on_fallback": "error"}
BATCHES = [{"input_ids": batch(seed, rows=3)} for seed in range(3)]


def observed(model, calibration, example_inputs=None, **skips):
    """The sums over the calibration inputs, by layer; the model stays dense."""
    config = SlopeConfig(**{f"skip_{part}": skip for part, skip in skips.items()})
    traced = trace(model, example_inputs)
    plans = plan_linears(model, traced, config, PatternRules(config.sparsity))
    return observe(model, sparse_plans(plans), calibration, grams=True)


def hooked(model, names):
    """The same by hooks on modules, in float64: (squares, gram) by layer."""
    sums = {}

    def hook(name):
        def add(module, args):
            x = args[0].detach().double().reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.t() @ x

        return add

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    with torch.no_grad():
        for inputs in BATCHES:
            model(**inputs, use_cache=False) if hasattr(model.config, "use_cache") else model(
                **inputs
            )
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("kind", models.TRANSFORMERS)
def test_what_linears_read_is_summed_up(kind):
    model = models.TRANSFORMERS[kind]().train()
    before = copy.deepcopy(model.state_dict())
    found = observed(model, BATCHES)
    assert model.training
    assert all(m._compiled_call_impl is None for m in model.modules())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    want = hooked(model.eval(), found)
    assert want.keys() == found.keys()
    for name, sums in found.items():
        assert sums.rows.tolist() == [3 * 3 * 16]
        torch.testing.assert_close(sums.gram[0].double(), want[name], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            sums.squares[0].double(), want[name].diag(), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("form", [name for name, make in FORMS.items()])
def test_however_a_linear_is_written_it_is_seen(form):
    torch.manual_seed(0)
    layer = FORMS[form]()
    x = torch.randn(2, 5, WIDTH)
    told = contextlib.nullcontext()
    if form == "one of a stack":
        told = pytest.warns(slope_fx.errors.ArgumentWarning, match=r"w's matrices 1 \(of 3\)")
    with told:
        found = observed(layer, [x, 2 * x], x, first=False, head=False)
    assert found
    if form == "one of a stack":
        assert torch.equal(found["w"].gram[1], torch.eye(WIDTH))
        return
    for sums in found.values():
        assert (sums.rows > 0).all()
        torch.testing.assert_close(sums.gram.diagonal(dim1=1, dim2=2), sums.squares)
    if isinstance(layer, Written):  # its one product reads the layer's own input
        flat = x.double().reshape(-1, WIDTH)
        (sums,) = found.values()
        uses, rest = divmod(int(sums.rows[0]), 2 * len(flat))
        if sums.gram.shape == (1, WIDTH, WIDTH) and not rest:  # "mv" reads one token alone
            torch.testing.assert_close(
                sums.gram[0].double(), 5 * uses * (flat.t() @ flat), rtol=1e-4, atol=1e-4
            )


def test_each_expert_is_summed_up_by_itself():
    torch.manual_seed(0)
    layer, x = Experts(), torch.randn(2, 5, WIDTH)
    found = observed(layer, [x], x, first=False, head=False)
    tokens = x.reshape(-1, WIDTH).double()
    which = (torch.arange(len(tokens)) * 7) % EXPERTS
    for i in range(EXPERTS):
        own = tokens[which == i]
        assert found["up"].rows[i] == found["down"].rows[i] == len(own)
        torch.testing.assert_close(
            found["up"].gram[i].double(), own.t() @ own, rtol=1e-4, atol=1e-4
        )
        hidden = (own @ layer.up[i].detach().double().t()).relu()
        torch.testing.assert_close(
            found["down"].gram[i].double(), hidden.t() @ hidden, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("sparsity", ["2:4", "1:8"])
def test_wanda_keeps_what_its_scores_say(sparsity):
    """|W_ij| |X_j| (arXiv 2306.11695), the top N of each M."""
    dense = models.llama().eval()
    # Some inputs are much larger than others, as in a trained model.
    for block in dense.model.layers:
        block.post_attention_layernorm.weight.data.uniform_(0.01, 3)
    model = slope_fx.compile(
        copy.deepcopy(dense), sparsity, mask="wanda", calibration=BATCHES, **BACKEND
    )
    weights = slope_fx.sparse_weights(model)
    want = hooked(dense, weights)
    differs = 0
    for name, weight in weights.items():
        w = dense.get_submodule(name).weight.detach().double()
        scores = w.abs() * want[name].diag().sqrt()
        mask = top_n_mask(scores, weight.n, weight.m)
        differs += int((mask != top_n_mask(w.abs(), weight.n, weight.m)).sum())
        # fp32 sums may turn a tie around, and no more.
        assert (mask != weight.forward_mask()).sum() <= 2
    assert differs > 100


@settings(max_examples=25)
@given(st.integers(2, 20), st.integers(2, 24), st.integers(1, 6), st.booleans(), seeds)
def test_low_rank_factors_are_the_best_there_are(d_out, d_in, rank, weighted, seed):
    """Eckart and Young: what is left is the tail of the singular values; weighted, of E G^1/2."""
    rank = min(rank, d_out, d_in)
    matrix = normal((d_out, d_in), seed, torch.float64)
    x = normal((2 * d_in, d_in), seed + 1, torch.float64) @ normal((d_in, d_in), 7, torch.float64)
    gram = x.t() @ x if weighted else None
    a, b = low_rank(matrix, rank, gram)
    assert a.shape == (rank, d_in)
    assert b.shape == (d_out, rank)
    seen = x.t() if weighted else torch.eye(d_in, dtype=torch.float64)
    values = torch.linalg.svdvals(matrix @ seen)
    left = ((matrix - b @ a) @ seen).square().sum()
    assert left <= values[rank:].square().sum() * (1 + 1e-6) + 1e-9 * values.square().sum()
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-6, atol=1e-9)


def test_low_rank_of_inputs_that_leave_directions_out():
    """Fewer tokens than inputs: the Gram matrix is singular, and so it is in fp32."""
    x, matrix = normal((5, 24), 0), normal((8, 24), 1)
    a, b = low_rank(matrix, 3, x.t() @ x)
    left = ((matrix - b @ a).double() @ x.t().double()).norm()
    values = torch.linalg.svdvals(matrix.double() @ x.t().double())
    assert left <= 1.01 * values[3:].norm() + 1e-3 * values.norm()
    a, b = low_rank(torch.zeros(8, 24), 3, x.t() @ x)
    assert not (b @ a).any()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_better_beginnings_are_better(kind):
    """On the calibration inputs: none, SVD, EoRA; each nearer to the dense outputs, layer by layer.

    EoRA is the best of rank r for what a layer adds to its outputs, so no other can be nearer.
    """
    torch.manual_seed(0)
    dense = models.TRANSFORMERS[kind]().eval()
    errors = {}
    for init in ("zero", "svd", "eora"):
        model = slope_fx.compile(
            copy.deepcopy(dense), "2:4", adapter_rank=6, adapter_init=init,
            calibration=BATCHES if init == "eora" else None, **BACKEND,
        )  # fmt: skip
        weights = slope_fx.sparse_weights(model)
        grams = hooked(dense, weights)
        errors[init] = []
        for name, weight in weights.items():
            w = dense.get_submodule(name).weight.detach().double()
            w = w.t() if kind == "gpt2" else w
            assert weight.adapter_active == (init != "zero")
            kept = weight.to_dense().double()
            if weight.adapter_active:
                kept = kept + weight.scale * weight.lora_B.double() @ weight.lora_A.double()
            errors[init].append((((w - kept) @ grams[name]) * (w - kept)).sum().item())
    for none, svd, eora in zip(*errors.values(), strict=True):
        assert eora < svd < none


def test_the_schedule_leaves_adapters_that_are_at_work_at_work():
    model = slope_fx.compile(models.gpt2(), "2:4", adapter_rank=2, adapter_init="svd", **BACKEND)
    schedule = slope_fx.Schedule(model, 10)
    assert schedule.phase == "adapter"
    assert all(weight.adapter_active for weight in slope_fx.sparse_weights(model).values())
    with pytest.warns(slope_fx.errors.TrainingWarning, match="trained already"):
        slope_fx.Schedule(model, 10, adapter_start=0.5).step()


def test_a_callable_begins_adapters(tmp_path):
    """With stacks of experts it is asked once a matrix."""
    asked = []

    def mine(name, weight, mask, rank):
        asked.append(name)
        assert weight.shape == mask.shape
        return torch.ones(rank, weight.shape[1]), torch.full((weight.shape[0], rank), 2.0)

    torch.manual_seed(0)
    layer, x = Experts(), torch.randn(2, 5, WIDTH)
    model = slope_fx.compile(
        layer, "2:4", adapter_rank=3, adapter_init=mine, example_inputs=x, skip_first=False,
        skip_head=False, **BACKEND,
    )  # fmt: skip
    assert asked == ["up"] * EXPERTS + ["down"] * EXPERTS
    weight = slope_fx.sparse_weights(model)["up"]
    added = weight.scale * weight.lora_B.view(EXPERTS, -1, 3) @ weight.lora_A.view(EXPERTS, 3, -1)
    torch.testing.assert_close(added, torch.full_like(added, 6.0))


class Never(nn.Module):
    """A layer that its forward may leave out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x, all_of_it=True):
        return self.head(self.b(self.a(x)) if all_of_it else self.a(x))


MISTAKES = {
    "no calibration": ({"mask": "wanda"}, ArgumentError, 'mask="wanda" needs'),
    "a lone batch": (
        {"mask": "wanda", "calibration": torch.ones(2, 16)}, ArgumentError,
        "calibration is a Tensor",
    ),
    "no batch": ({"mask": "wanda", "calibration": []}, ArgumentError, "no batch"),
    "not inputs": (
        {"mask": "wanda", "calibration": [3]}, ArgumentError, "batch 0 is a int",
    ),
    "wrong inputs": (
        {"mask": "wanda", "calibration": [torch.ones(2, 3)]}, ArgumentError,
        "fails on batch 0",
    ),
    "NaN": (
        {"mask": "wanda", "calibration": [torch.full((2, 16), torch.nan)]},
        ArgumentError, "NaN",
    ),
    "unseen": (
        {"mask": "wanda", "calibration": [(torch.ones(2, 16), False)]},
        ArgumentError, "no input of b",
    ),
    "no rank": ({"adapter_init": "svd"}, ArgumentError, "adapter_rank is None"),
    "no such": ({"adapter_init": "pca", "adapter_rank": 2}, ArgumentError, "allowed are"),
    "wrong factors": (
        {"adapter_init": lambda *a: 3, "adapter_rank": 2}, ArgumentError,
        "returned int",
    ),
    "wrong shapes": (
        {"adapter_init": lambda n, w, m, r: (w, w), "adapter_rank": 2},
        ArgumentError, "returned shapes",
    ),
    "no mask of that name": ({"mask": "Wanda"}, ArgumentError, '"wanda"'),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_leave_the_model_as_it_was(mistake):
    arguments, error, words = MISTAKES[mistake]
    model = Never()
    before = dict(model.named_parameters())
    with pytest.raises(error, match=words):
        slope_fx.compile(model, "2:4", example_inputs=torch.ones(2, 16), **BACKEND, **arguments)
    assert dict(model.named_parameters()) == before
    assert type(model) is Never
    assert all("_compiled_call_impl" not in m.__dict__ for m in model.modules())
    assert all(m._compiled_call_impl is None for m in model.modules())
    assert model.training


def test_calibration_that_nothing_uses_is_told():
    with pytest.warns(slope_fx.errors.ArgumentWarning, match="calibration has no effect"):
        slope_fx.compile(models.gpt2(), "2:4", calibration=BATCHES, **BACKEND)
