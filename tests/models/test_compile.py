"""``compile`` as its user meets it: what it leaves alone, what it refuses, how it fails."""

import copy
import inspect
import io
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

import models
import slope_fx
from models import Plain, batch, loss_of
from slope_fx.errors import ArgumentError

X = torch.randn(3, 8)


def plain(**more):
    torch.manual_seed(0)
    model = Plain()
    return slope_fx.compile(model, **{"example_inputs": X, "backend": "aot_eager", **more})


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


def test_a_mask_of_another_pattern_does_not_load():
    two, four = plain(sparsity="2:4"), plain(sparsity="4:8", mask="random")
    before = copy.deepcopy(two.state_dict())
    with pytest.raises(RuntimeError, match=r"forward_bits: the mask keeps .* the layer is 2:4"):
        two.load_state_dict(four.state_dict())
    assert torch.equal(two.w_in_sparse.forward_bits, before["w_in_sparse.forward_bits"])


def test_a_backward_mask_that_is_not_n_of_m_does_not_load():
    model = plain()
    state = copy.deepcopy(model.state_dict())
    state["w_in_sparse.backward_bits"].fill_(255)
    with pytest.raises(RuntimeError, match=r"backward_bits: the mask keeps more than 2 of 4"):
        model.load_state_dict(state)


def test_a_dense_checkpoint_does_not_load_silently():
    with pytest.raises(RuntimeError, match="w_in_values"):
        plain().load_state_dict(Plain().state_dict())


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


def test_a_key_that_matches_nothing_is_told():
    with pytest.warns(slope_fx.errors.ArgumentWarning, match=r"sparsity\['\*\.mpl\.\*'\] matches"):
        plain(sparsity={"*.mpl.*": "2:8", "*": "2:4"})


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


def snapshot(model):
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "ids": {k: id(v) for k, v in model.named_parameters()},
        "types": [type(m) for m in model.modules()],
        "dicts": [sorted(m.__dict__) for m in model.modules()],
        "compiled": [m._compiled_call_impl for m in model.modules()],
    }


def assert_untouched(model, before):
    after = snapshot(model)
    for key in ("ids", "types", "dicts", "compiled"):
        assert after[key] == before[key], key
    assert list(after["state"]) == list(before["state"])
    assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())


def wrong_shape(name, weight):
    return torch.ones(3, 3, dtype=torch.bool)


def not_bool(name, weight):
    return torch.ones_like(weight)


def not_n_of_m(name, weight):
    return torch.ones_like(weight, dtype=torch.bool)


def raises(name, weight):
    if name == "w_out":
        raise KeyError("the second layer")
    keep = torch.zeros_like(weight, dtype=torch.bool)
    keep[:, ::2] = True
    return keep


MISTAKES = {
    "pattern": ({"sparsity": "5:4"}, ArgumentError, "5:4"),
    "pattern text": ({"sparsity": "2:3x"}, ArgumentError, "2:3x"),
    "pattern in a mapping": ({"sparsity": {"*": "3:3"}}, ArgumentError, "3:3"),
    "rank 0": ({"adapter_rank": 0}, ArgumentError, "adapter_rank=0"),
    "negative rank": ({"adapter_rank": -3}, ArgumentError, "adapter_rank=-3"),
    "rank too large": ({"adapter_rank": 17}, ArgumentError, "w_in, which is only"),
    "rank as a bool": ({"adapter_rank": True}, ArgumentError, "True"),
    "fraction above 1": ({"adapter_rank": 1.5}, ArgumentError, "1.5"),
    "fraction too large": ({"adapter_rank": 0.9}, ArgumentError, "w_out"),
    "skip_first": ({"skip_first": "no"}, ArgumentError, "skip_first='no'"),
    "skip_head": ({"skip_head": 1}, ArgumentError, "skip_head=1"),
    "mask tensor": ({"mask": torch.ones(9)}, ArgumentError, "mask is a Tensor"),
    "mask name": ({"mask": "biggest"}, ArgumentError, "biggest"),
    "mask shape": ({"mask": wrong_shape}, ArgumentError, r"shape \(3, 3\)"),
    "mask dtype": ({"mask": not_bool}, ArgumentError, "float32"),
    "mask not N:M": ({"mask": not_n_of_m}, ArgumentError, "keeps 4 elements in group 0"),
    "mask raises": ({"mask": raises}, KeyError, "the second layer"),
    "backend": ({"backend": "indcutor"}, ArgumentError, "indcutor"),
    "backend list": ({"backend": ["inductor"]}, ArgumentError, "inductor"),
    "backend type": ({"backend": 3}, ArgumentError, "backend=3"),
    "region": ({"region": "block"}, ArgumentError, "'blocks'"),
    "on_fallback": ({"on_fallback": "raise"}, ArgumentError, "'error'"),
    "inputs of the wrong width": (
        {"example_inputs": torch.randn(3, 9)}, ArgumentError, "fails on them",
    ),
    "too many inputs": (
        {"example_inputs": (X, X)}, ArgumentError, "too many positional",
    ),
    "unknown keyword": ({"example_inputs": {"y": X}}, ArgumentError, "'x'"),
    "inputs of the wrong kind": ({"example_inputs": "x"}, ArgumentError, "str"),
    "nothing eligible": (
        {"sparsity": {"*": None}}, slope_fx.errors.NoEligibleLinearError, "w_in: sparsity",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_leave_the_model_as_it_was(mistake):
    arguments, error, words = MISTAKES[mistake]
    model = Plain()
    before = snapshot(model)
    with pytest.raises(error, match=words) as caught:
        slope_fx.compile(model, **{"example_inputs": X, "backend": "aot_eager", **arguments})
    assert error is KeyError or isinstance(caught.value, slope_fx.errors.SlopeError)
    assert_untouched(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slope_fx.compile(model, example_inputs=X, backend="aot_eager")
    assert model(X).isfinite().all()


def test_a_failure_half_way_through_installing_is_undone(monkeypatch):
    import slope_fx.sparse.install

    model = Plain()
    before = snapshot(model)
    made = []
    real = slope_fx.sparse.install.SparseWeight

    def fails_on_the_second(*args, **kwargs):
        if made:
            raise MemoryError("no room")
        made.append(real(*args, **kwargs))
        return made[0]

    monkeypatch.setattr(slope_fx.sparse.install, "SparseWeight", fails_on_the_second)
    with pytest.raises(MemoryError):
        slope_fx.compile(model, example_inputs=X, backend="aot_eager")
    assert_untouched(model, before)


def test_a_width_that_does_not_divide_is_dense_not_an_error():
    model = nn.Sequential(nn.Linear(8, 18), nn.Linear(18, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    slope_fx.compile(model, example_inputs=X, backend=None)
    rows = {r.name: r.reason for r in slope_fx.explain(model).linears}
    assert rows["1"] == "its input width 18 is not divisible by 4"
    assert rows["2"] == ""


def test_no_linear_at_all():
    with pytest.raises(slope_fx.errors.NoEligibleLinearError, match="No linear was found"):
        slope_fx.compile(nn.Conv1d(3, 3, 3), example_inputs=torch.randn(1, 3, 8))


def test_compiled_twice():
    model = plain()
    state = snapshot(model)
    with pytest.raises(slope_fx.errors.StateError):
        slope_fx.compile(model, example_inputs=X)
    with pytest.raises(slope_fx.errors.StateError):
        slope_fx.compile(nn.Sequential(model), example_inputs=X)
    assert_untouched(model, state)


@pytest.mark.parametrize("function", [slope_fx.explain, slope_fx.sparse_weights])
def test_functions_on_compiled_models_refuse_others(function):
    with pytest.raises(slope_fx.errors.StateError, match="Plain"):
        function(Plain())
    with pytest.raises(slope_fx.errors.StateError):
        function(nn.Sequential(plain()))


def test_not_a_module_and_no_data():
    with pytest.raises(ArgumentError, match="function"):
        slope_fx.compile(lambda x: x)
    with torch.device("meta"):
        model = Plain()
    with pytest.raises(ArgumentError, match="meta device"):
        slope_fx.compile(model, example_inputs=X)


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


def test_models_that_are_wrapped_or_compiled_already():
    model = Plain()
    with pytest.raises(ArgumentError, match=r"compiled by torch.compile already"):
        slope_fx.compile(torch.compile(model), example_inputs=X)
    model.head.compile()
    with pytest.raises(ArgumentError, match=r"head is compiled by torch.compile"):
        slope_fx.compile(model, example_inputs=X)
    wrapped = nn.DataParallel(Plain())
    with pytest.raises(ArgumentError, match="wrapped in DataParallel"):
        slope_fx.compile(wrapped, example_inputs=X)


def test_a_lazy_module_is_left_as_it_was():
    model = nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 16))
    with pytest.raises(ArgumentError, match=r"0.weight is not initialised yet"):
        slope_fx.compile(model, example_inputs=X)
    assert isinstance(model[0], nn.LazyLinear)


def test_an_untraceable_forward_leaves_nothing_behind(capfd):
    """It is run to see whether the inputs fit, but on a copy."""

    class Remembers(Plain):
        cache = None

        def forward(self, x):
            if self.cache is None:
                self.cache = x.sum()
            scale = float(x.detach().numpy().mean())
            return super().forward(x) * scale

    model = Remembers()
    with pytest.warns(slope_fx.errors.ArgumentWarning, match="torch.export failed"):
        slope_fx.compile(model, {"head": None, "*": "2:4"}, example_inputs=X, skip_first=False,
                         skip_head=False, backend=None)  # fmt: skip
    assert model.cache is None
    with pytest.raises(ArgumentError):
        slope_fx.compile(Plain(), example_inputs=torch.randn(3, 9))
    assert len(capfd.readouterr().err.splitlines()) < 20


def test_an_optimizer_made_too_early_is_told():
    """At its first step, once: it holds weights that no layer has any more."""
    model = Plain()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    slope_fx.compile(model, example_inputs=X, backend="aot_eager")
    model(X).sum().backward()
    with pytest.warns(slope_fx.errors.TrainingWarning, match="SGD was made before"):
        early.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        early.step()
        torch.optim.SGD(model.parameters(), lr=0.1).step()


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
