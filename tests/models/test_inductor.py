"""A few whole models through Inductor, C++ compiler and all."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
import slope_fx
from architectures import inputs_of, logits_of, made
from formulas import assert_gradients_match, formula_model
from models import Plain, batch, loss_of

pytestmark = pytest.mark.inductor


@pytest.mark.parametrize("region", [pytest.param("model", marks=pytest.mark.full), "blocks"])
def test_gpt2_in_both_phases(region):
    dense = models.gpt2(layers=2)
    model = slope_fx.compile(
        copy.deepcopy(dense), adapter_rank=2, backend="inductor", region=region, on_fallback="error"
    )
    schedule = slope_fx.Schedule(model, 2, adapter_start=0.5)
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_B.data.normal_(std=0.5)
    ids = batch()
    for step in range(2):
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        reference = formula_model(dense, model)
        loss_of(reference, ids).backward()
        assert_gradients_match(model, reference, rtol=2e-4)
        if step == 0:
            schedule.step()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Unequal(nn.Module):
    """Blocks of one class, which share their code, of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 32)
        self.blocks = nn.ModuleList([Block(16), Block(32)])

    def forward(self, x):
        return self.blocks[1](self.second(self.blocks[0](self.first(x))))


def test_layers_that_share_code_with_other_scales():
    """Of a scale that differs between them Dynamo makes an input of the graph."""
    dense, x = Unequal(), torch.randn(4, 16)
    for ranks in ({"adapter_rank": 0.25}, {"adapter_rank": 2}, {"adapter_rank": 8}):
        model = slope_fx.compile(
            copy.deepcopy(dense), **ranks, region="blocks", example_inputs=x, skip_head=False,
            on_fallback="error",
        )  # fmt: skip
        slope_fx.Schedule(model, 1, adapter_start=0.0)
        for weight in slope_fx.sparse_weights(model).values():
            weight.lora_B.data.normal_()
        reference = formula_model(dense, model)
        got, want = model(x), reference(x.double())
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
        got.sum().backward()
        want.sum().backward()
        assert_gradients_match(model, reference, rtol=1e-4)


@pytest.mark.full
def test_plain_model_in_bf16():
    """Own parameters, bf16, a dynamic batch, and a weight that something else reads too."""

    class Reads(Plain):
        def forward(self, x):
            return super().forward(x) + self.w_in.float().square().mean()

    torch.manual_seed(0)
    x = torch.randn(3, 8).bfloat16()
    model = slope_fx.compile(Reads().bfloat16(), example_inputs=x, sparsity="2:8", skip_head=False)
    assert set(slope_fx.sparse_weights(model)) == {"w_out"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (3, 5, 7):
            loss = model(torch.randn(rows, 8).bfloat16()).float().sum()
            loss.backward()
            assert loss.isfinite()


@pytest.mark.full
@pytest.mark.parametrize(("name", "rank"), [("Mixtral", 2), ("GraniteMoe", 3)])
def test_experts_with_adapters_of_any_rank_in_bf16(name, rank):
    """torch's grouped products take rows of whole 16 bytes only, which a rank need not fill."""
    torch.manual_seed(0)
    model = made(name).bfloat16()
    slope_fx.compile(model, adapter_rank=rank, backend="aot_eager", on_fallback="error")
    slope_fx.Schedule(model, 1, adapter_start=0.0)
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_B.data.normal_(std=0.5)
    inputs = inputs_of(model)
    want = logits_of(slope_fx.densify(model), inputs)
    got = logits_of(model, inputs)
    apart = (got - want).float().norm(dim=-1) / want.float().norm(dim=-1)
    assert (apart < 0.1).float().mean() > 0.7  # a token near a tie may go to another expert
    got.float().square().sum().backward()
    assert all(w.lora_A.grad.any() for w in slope_fx.sparse_weights(model).values())


class Packed(nn.Module):
    """Query, key and value in one weight and bias, of which each product takes its own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.w, self.b = nn.Parameter(torch.randn(48, 16) / 4), nn.Parameter(torch.randn(48))

    def forward(self, x):
        x = self.first(x)
        q, k, v = (F.linear(x, self.w[i : i + 16], self.b[i : i + 16]) for i in (0, 16, 32))
        return self.head(F.scaled_dot_product_attention(q, k, v))


def assert_trains_by_the_formulas(dense, x, active):
    model = slope_fx.compile(
        copy.deepcopy(dense), adapter_rank=4, example_inputs=x, on_fallback="error"
    )
    slope_fx.Schedule(model, 1, adapter_start=float(not active))
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_B.data.normal_(std=0.5)
    reference = formula_model(dense, model)
    got, want = model(x), reference(x.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    got.square().sum().backward()
    want.square().sum().backward()
    assert_gradients_match(model, reference, rtol=1e-4)


@pytest.mark.parametrize(
    "active", [pytest.param(False, marks=pytest.mark.full), True], ids=["sparse", "adapter"]
)
def test_rows_of_a_packed_weight(active):
    assert_trains_by_the_formulas(Packed(), torch.randn(2, 5, 8), active)


def test_values_written_between_micro_batches():
    """What an engine keeps of a weight to use again is of the weight as it is."""
    dense, x = Unequal(), torch.randn(4, 16)
    model = slope_fx.compile(copy.deepcopy(dense), example_inputs=x, engine="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):  # so that it sees that it will be used again
        for _ in range(3):
            model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(2):
        model(x).square().sum().backward()
    with torch.no_grad():
        for weight in slope_fx.sparse_weights(model).values():
            weight.values.mul_(-0.5)
    optimizer.zero_grad()
    reference = formula_model(dense, model)
    model(x).square().sum().backward()
    reference(x.double()).square().sum().backward()
    assert_gradients_match(model, reference, rtol=1e-4)


class Attention(nn.Module):
    """Query, key and value by linears of their own, with biases, which one op computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        return self.head(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


@pytest.mark.parametrize("active", [False, True], ids=["sparse", "adapter"])
def test_linears_with_biases_that_are_merged(active):
    dense, x = Attention(), torch.randn(2, 5, 8)
    for linear in (dense.q, dense.k, dense.v):
        nn.init.normal_(linear.bias)
    assert_trains_by_the_formulas(dense, x, active)
