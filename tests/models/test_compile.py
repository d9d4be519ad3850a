"""``compile`` as its user meets it: what it makes of a model, and what it leaves alone."""

import copy
import inspect
import io
import json
import pickle

import pytest
import torch
from torch import nn

import models
import slope_fx
from compile_cases import X, plain
from models import Plain, batch, loss_of


def test_same_object_same_type_same_signature():
    model = models.gpt2()
    cls, signature = type(model), inspect.signature(model.forward)
    compiled = slope_fx.compile(model, backend="aot_eager")
    assert compiled is model
    assert isinstance(compiled, cls)
    assert type(compiled).__name__ == cls.__name__
    assert inspect.signature(compiled.forward) == signature
    assert all(isinstance(m, nn.Module) for m in compiled.modules())


def test_own_parameters_by_either_orientation():
    model = plain()
    assert set(slope_fx.sparse_weights(model)) == {"w_in", "w_out"}
    with torch.no_grad():
        assert model.w_in.shape == (32, 16)
        assert model.w_out.shape == (32, 16)
    assert model.w_in_values.shape == (32, 8)
    assert model.w_out_values.shape == (16, 16)


def test_state_dict_keys_are_readable_and_load_into_a_fresh_compile():
    model = plain(adapter_rank=2)
    keys = set(model.state_dict())
    assert {"w_in_values", "w_in_sparse.forward_bits", "w_in_sparse.lora_A"} <= keys
    assert not any("_orig_mod" in key or key == "w_in" for key in keys)
    torch.manual_seed(1)
    other = slope_fx.compile(Plain(), adapter_rank=2, mask="random", example_inputs=X, backend=None)
    assert not torch.equal(other.w_in_sparse.forward_bits, model.w_in_sparse.forward_bits)
    other.load_state_dict(model.state_dict())
    for name, weight in slope_fx.sparse_weights(model).items():
        loaded = slope_fx.sparse_weights(other)[name]
        assert torch.equal(loaded.to_dense(), weight.to_dense())
        assert torch.equal(loaded.backward_mask(), weight.backward_mask())


def test_trained_adapters_are_active_after_loading():
    """No flag is saved: the adapter takes part wherever B isn't zero."""
    model = plain(adapter_rank=2)
    slope_fx.Schedule(model, total_steps=1, adapter_start=0.0)
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_B.data.normal_()
    other = plain(adapter_rank=2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_compiled_models_of_their_own(how, backend):
    model = plain(adapter_rank=2, on_fallback="error")
    want = model(X)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert isinstance(other, Plain)
    assert torch.equal(other(X), want)
    assert backend.graphs == 1  # the code of the first serves the copy
    other(X).sum().backward()
    assert other.w_in_values.grad is not None
    assert model.w_in_values.grad is None
    other.w_in_values.data.zero_()
    assert torch.equal(model(X), want)
    slope_fx.Schedule(other, total_steps=1, adapter_start=0.0)
    assert not model.w_in_sparse.adapter_active
    assert str(slope_fx.explain(other)) == str(slope_fx.explain(model))


def test_generate():
    model = models.gpt2()
    ids = batch(rows=1, length=4)
    slope_fx.compile(model, backend="aot_eager", on_fallback="error")
    dense = copy.deepcopy(model).eval()
    model.eval()
    got = model.generate(ids, max_new_tokens=12, do_sample=False)
    # Greedy decoding by hand, without a cache.
    want = ids
    with torch.no_grad():
        for _ in range(12):
            logits = dense(input_ids=want, use_cache=False).logits
            want = torch.cat([want, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, want[:, : got.shape[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "2:8", "3:8", "8:16", "5:16"])
def test_dtypes_and_patterns(dtype, pattern):
    model = Plain().to(dtype)
    slope_fx.compile(
        model, pattern, adapter_rank=2, example_inputs=X.to(dtype), backend="aot_eager",
        on_fallback="error",
    )  # fmt: skip
    model(X.to(dtype)).float().sum().backward()
    for weight in slope_fx.sparse_weights(model).values():
        assert str(weight.pattern) == pattern
        assert weight.values.dtype == weight.lora_A.dtype == weight.values.grad.dtype == dtype
        kept = weight.forward_mask().sum().item()
        assert kept == weight.d_out * weight.d_in * weight.n // weight.m


def test_moving_to_another_dtype_keeps_the_masks():
    model = plain()
    mask = model.w_in_sparse.forward_bits.clone()
    model.to(torch.bfloat16)
    assert model.w_in_values.dtype == torch.bfloat16
    assert torch.equal(model.w_in_sparse.forward_bits, mask)
    assert model(X.bfloat16()).dtype == torch.bfloat16


def test_patterns_by_layer_name():
    model = models.gpt2()
    slope_fx.compile(
        model, {"*.h.0.*": None, "*.mlp.*": "2:8", "*": "1:2"}, backend=None, skip_first=False
    )
    patterns = {name: str(w.pattern) for name, w in slope_fx.sparse_weights(model).items()}
    assert patterns == {
        "transformer.h.1.attn.c_attn": "1:2",
        "transformer.h.1.attn.c_proj": "1:2",
        "transformer.h.1.mlp.c_fc": "2:8",
        "transformer.h.1.mlp.c_proj": "2:8",
    }
    rows = {r.name: r.reason for r in slope_fx.explain(model).linears}
    assert rows["transformer.h.0.mlp.c_fc"] == "sparsity['*.h.0.*'] is None"


def test_masks_of_the_users_own():
    seen = {}

    def mask(name, weight):
        seen[name] = weight.shape
        keep = torch.zeros_like(weight, dtype=torch.bool)
        keep[:, 1::2] = True
        return keep

    model = plain(mask=mask)
    assert seen == {"w_in": (32, 16), "w_out": (16, 32)}
    assert torch.equal(
        model.w_out_sparse.forward_mask(), torch.arange(32).remainder(2).bool().expand(16, 32)
    )


def test_random_masks_keep_every_place_equally_often():
    torch.manual_seed(0)
    model = Plain(width=256)
    slope_fx.compile(model, "2:4", mask="random", example_inputs=X, backend=None)
    places = model.w_in_sparse.forward_mask().view(-1, 4).float().mean(0)
    assert ((places - 0.5).abs() < 0.01).all()


def test_a_width_that_does_not_divide_is_dense_not_an_error():
    model = nn.Sequential(nn.Linear(8, 18), nn.Linear(18, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    slope_fx.compile(model, example_inputs=X, backend=None)
    rows = {r.name: r.reason for r in slope_fx.explain(model).linears}
    assert rows["1"] == "its input width 18 is not divisible by 4"
    assert rows["2"] == ""


def test_frozen_and_thawed():
    model = plain(adapter_rank=2)
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    assert all(p.requires_grad == p.is_floating_point() for p in model.parameters())


def test_a_name_that_is_taken_keeps_the_layer_dense():
    class Model(Plain):
        def __init__(self):
            super().__init__()
            self.w_in_values = nn.Parameter(torch.ones(3))

    model = slope_fx.compile(Model(), example_inputs=X, backend=None)
    assert set(slope_fx.sparse_weights(model)) == {"w_out"}
    rows = {r.name: r.reason for r in slope_fx.explain(model).linears}
    assert rows["w_in"] == "its module has a w_in_values of its own"


def test_explain_as_table_and_as_data():
    model = models.gpt2()
    slope_fx.compile(model, "2:4", adapter_rank=4, backend=None)
    explanation = slope_fx.explain(model)
    table = str(explanation)
    assert "transformer.h.0.attn.c_attn" in table
    assert "7 of 9 linears are sparse." in table
    data = json.loads(json.dumps(explanation.to_dict()))
    assert slope_fx.report.Explanation.from_dict(data) == explanation
    assert len(data["linears"]) == 9
    weights = slope_fx.sparse_weights(model)
    for row in explanation.sparse:
        weight = weights[row.name]
        parts = [weight.values, *weight.parameters()]
        assert row.bytes_after == sum(p.numel() * p.element_size() for p in parts)
        assert row.bytes_before == row.shape[0] * row.shape[1] * 4
        assert row.state_before == row.shape[0] * row.shape[1] * 16
        assert (row.rank, row.products, row.reason) == (4, (), "")
    assert "(not run yet)" in table


def test_a_linear_shared_with_an_embedding_goes_by_its_own_name():
    model = models.gpt2()
    slope_fx.compile(model, backend=None)
    assert "lm_head" in {r.name for r in slope_fx.explain(model).linears}


def test_user_inputs_for_a_transformers_model():
    model = models.gpt2()
    ids = batch()
    slope_fx.compile(model, example_inputs={"input_ids": ids, "labels": ids}, backend="aot_eager")
    assert loss_of(model, ids).isfinite()


def test_args_and_kwargs_together():
    class TwoInputs(Plain):
        def forward(self, x, *, scale):
            return super().forward(x) * scale

    model = TwoInputs()
    slope_fx.compile(model, example_inputs=((X,), {"scale": 2.0}), backend="aot_eager")
    assert model(X, scale=2.0).isfinite().all()
