"""What the traced graph says of weights, and what compile makes of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTForImageClassification

import models
import slope_fx
from architectures import ARCHITECTURES, plain_experts

SKIPPED = {
    "gpt2": {"transformer.h.0.attn.c_attn": "embeddings", "lm_head": "shared"},
    "llama": {
        "model.layers.0.self_attn.q_proj": "embeddings",
        "model.layers.0.self_attn.k_proj": "embeddings",
        "model.layers.0.self_attn.v_proj": "embeddings",
        "lm_head": "output head",
    },
    "bert": {
        "bert.encoder.layer.0.attention.self.query": "embeddings",
        "bert.encoder.layer.0.attention.self.key": "embeddings",
        "bert.encoder.layer.0.attention.self.value": "embeddings",
        "cls.predictions.decoder": "shared",
    },
    "opt": {
        "model.decoder.layers.0.self_attn.q_proj": "embeddings",
        "model.decoder.layers.0.self_attn.k_proj": "embeddings",
        "model.decoder.layers.0.self_attn.v_proj": "embeddings",
        "lm_head": "shared",
    },
}
LINEARS = {"gpt2": 9, "llama": 15, "bert": 14, "opt": 13}


def reasons(model):
    return {r.name: r.reason for r in slope_fx.explain(model).linears if r.kind == "dense"}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", models.TRANSFORMERS)
def test_transformers_bring_their_own_inputs(name, checkpointing):
    model = models.TRANSFORMERS[name]()
    if checkpointing:
        model.gradient_checkpointing_enable()
    random_state = torch.get_rng_state()
    slope_fx.compile(model, mask="magnitude", backend=None)
    assert torch.equal(torch.get_rng_state(), random_state)
    dense = reasons(model)
    assert set(dense) == set(SKIPPED[name])
    for layer, words in SKIPPED[name].items():
        assert words in dense[layer]
    assert len(slope_fx.explain(model).linears) == LINEARS[name]


@pytest.mark.parametrize("name", models.TRANSFORMERS)
def test_skips_can_be_turned_off(name):
    model = models.TRANSFORMERS[name]()
    slope_fx.compile(model, skip_first=False, skip_head=False, backend=None)
    assert all("shared" in reason for reason in reasons(model).values())


def test_vision_transformer():
    config = ViTConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=2,
        image_size=16, patch_size=8, num_labels=8,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    slope_fx.compile(model, backend=None)
    dense = reasons(model)
    assert dense["classifier"] == "output head (skip_head)"
    assert sum("model's input" in reason for reason in dense.values()) == 3
    assert len(dense) == 4


class Branches(nn.Module):
    """Two outputs, one of them residual; weights read both ways, in parts, as two sizes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.residual = nn.Linear(16, 16)
        self.both = nn.Parameter(torch.randn(16, 16))
        self.columns = nn.Parameter(torch.randn(16, 32))
        self.uneven = nn.Parameter(torch.randn(32, 16))
        self.resized = nn.Parameter(torch.randn(16, 16))
        self.computed = nn.Parameter(torch.randn(16, 16))
        self.unused = nn.Linear(16, 16)
        self.odd_in = nn.Linear(18, 16)
        self.odd_out = nn.Linear(16, 18)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        h = self.first(x).relu()
        h = (h @ self.both).relu() @ self.both.t()
        h = F.linear(F.linear(h, self.columns[:, :16]), self.uneven[2:18])
        h = F.linear(h, self.resized) + F.linear(h[:, :8], self.resized.view(32, 8))[:, :16]
        h = F.linear(h, self.computed * 2)
        h = self.frozen(self.odd_in(self.odd_out(h)))
        h = h + self.residual(h)
        return {"logits": self.head(h).softmax(-1) * 2.0, "hidden": h}


def test_every_reason_to_stay_dense():
    model = Branches()
    slope_fx.compile(model, example_inputs=torch.randn(3, 16), backend=None)
    assert reasons(model) == {
        "first": "fed directly by the model's input (skip_first)",
        "both": "its weight is used both as it is and transposed",
        "columns": "its weight is used through linear.default",
        "uneven": "a linear uses its rows 2 to 18 alone, which aren't whole groups of 4",
        "resized": "its weight is used as matrices of different sizes",
        "computed": "its weight is used through mul.Tensor",
        "unused": "the traced forward doesn't use it",
        "odd_in": "its input width 18 is not divisible by 4",
        "odd_out": "its output width 18 is not divisible by 4",
        "head": "output head (skip_head)",
    }
    weights = slope_fx.sparse_weights(model)
    assert set(weights) == {"residual", "frozen"}
    assert not weights["frozen"].values.requires_grad


def test_linears_inside_checkpointed_regions_are_found():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 16)
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 4)

        def forward(self, ids):
            def body(h):
                return self.second(self.first(h).relu())

            return self.head(checkpoint(body, self.embed(ids), use_reentrant=False))

    model = Model()
    slope_fx.compile(model, example_inputs=torch.zeros(2, 3, dtype=torch.long), backend=None)
    assert set(slope_fx.sparse_weights(model)) == {"second"}
    assert "embeddings" in reasons(model)["first"]


def test_parametrized_linears_are_told():
    layers = [nn.Linear(16, 16) for _ in range(4)]
    torch.nn.utils.parametrizations.weight_norm(layers[1])
    model = nn.Sequential(*layers)
    slope_fx.compile(model, example_inputs=torch.randn(2, 16), backend=None)
    assert reasons(model)["1"] == "its weight is computed, not a parameter"
    assert set(slope_fx.sparse_weights(model)) == {"2"}


def test_shared_linears_stay_shared(backend):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.one, self.two = (nn.Linear(16, 16) for _ in range(3))
            self.two.weight = self.one.weight
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.two(self.one(self.first(x)).relu()))

    model = Model()
    x = torch.randn(3, 16)
    slope_fx.compile(model, example_inputs=x, backend="aot_eager", on_fallback="error")
    assert set(slope_fx.sparse_weights(model)) == {"one"}
    assert model.one.weight_values is model.two.weight_values
    model(x).sum().backward()
    assert model.one.weight_values.grad is not None
    assert {"one.weight_values", "two.weight_values"} <= set(model.state_dict())


class DataDependent(nn.Module):
    """A forward that no tracer can follow."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.first, self.second, self.head = (nn.Linear(16, 16) for _ in range(3))
        self.tied = nn.Linear(16, 8, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, ids):
        h = self.first(self.embed(ids))
        if h.sum().item() > 0:
            h = self.second(h)
        return self.head(h) + self.tied(h).sum()


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
def test_untraceable_models_fall_back_to_module_types(given):
    model = DataDependent()
    inputs = torch.zeros(2, dtype=torch.long) if given else None
    why = "torch.export failed" if given else "no example_inputs"
    with pytest.warns(slope_fx.errors.ArgumentWarning, match=why):
        slope_fx.compile(model, example_inputs=inputs, backend=None)
    assert set(slope_fx.sparse_weights(model)) == {"second", "head"}
    dense = reasons(model)
    assert "model's input" in dense["first"]
    assert "Embedding.weight" in dense["tied"]
    assert "not traced" in str(slope_fx.explain(model))


def test_experts_in_a_loop_are_told():
    """Which experts are hit depends on the data, so the model can't be traced."""
    model = plain_experts(ARCHITECTURES["Mixtral"]())
    with pytest.warns(slope_fx.errors.ArgumentWarning):
        slope_fx.compile(model, backend=None)
    dense = reasons(model)
    for name in ("gate_up_proj", "down_proj"):
        reason = dense[f"model.layers.1.mlp.experts.{name}"]
        assert reason.startswith("the model was not traced, so the use of this")
