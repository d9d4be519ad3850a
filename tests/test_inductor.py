"""A few whole models through Inductor, C++ compiler and all."""

import copy
import warnings

import pytest
import torch

import models
import slope_fx
from formulas import assert_gradients_match, formula_model
from models import Plain, batch, loss_of

pytestmark = pytest.mark.inductor


@pytest.mark.parametrize("region", ["model", "blocks"])
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
