"""Back to dense, and adapters to PEFT: the same numbers, by transformers and PEFT alone."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import models
import slope_fx
from architectures import made
from forms import FORMS, WIDTH
from models import batch, logits, loss_of

BACKEND = {"backend": "eager", "on_fallback": "error"}


def adapted(kind="gpt2", rank=4, active=True):
    """Compiled, with adapters as a training would leave them."""
    torch.manual_seed(0)
    model = slope_fx.compile(models.TRANSFORMERS[kind](), "2:4", adapter_rank=rank, **BACKEND)
    slope_fx.Schedule(model, 2, adapter_start=0.0 if active else 1.0)
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_B.data.normal_(std=0.3)
    return model.eval()


def is_plain(model):
    """No class, parameter or submodule of slope_fx is left."""
    kinds = {type(m) for m in model.modules()}
    return (
        not any(hasattr(kind, "_slope_kind") for kind in kinds)
        and not any("_values" in n or "_sparse" in n for n in model.state_dict())
        and all(m._compiled_call_impl is None for m in model.modules())
        and "_slope_fx" not in model.__dict__
    )


@pytest.mark.parametrize("kind", models.TRANSFORMERS)
def test_merged_computes_the_same(kind, tmp_path):
    model = adapted(kind)
    want, before = logits(model), [n for n, _ in model.named_parameters()]
    dense = slope_fx.densify(model)
    assert is_plain(dense)
    torch.testing.assert_close(logits(dense), want, rtol=1e-4, atol=1e-5)
    fresh = models.TRANSFORMERS[kind]()
    assert type(dense) is type(fresh)
    assert {n: v.shape for n, v in dense.state_dict().items()} == {
        n: v.shape for n, v in fresh.state_dict().items()
    }
    assert [n for n, _ in model.named_parameters()] == before  # a copy was changed
    assert torch.equal(logits(model), want)
    dense.save_pretrained(tmp_path)
    assert torch.equal(logits(type(fresh).from_pretrained(tmp_path)), logits(dense))


@pytest.mark.parametrize("form", FORMS)
def test_each_form_becomes_itself_again(form):
    """Stacks, transposed weights, shared ones, torch's attention."""
    torch.manual_seed(0)
    layer, x = FORMS[form](), torch.randn(2, 5, WIDTH)
    shapes = {name: p.shape for name, p in layer.named_parameters()}
    kind = type(layer)
    model = slope_fx.compile(
        layer, "2:4", adapter_rank=2, skip_first=False, skip_head=False, example_inputs=x, **BACKEND
    )
    slope_fx.Schedule(model, 2, adapter_start=0.0)
    weights = list(slope_fx.sparse_weights(model).values())
    masks = [weight.forward_mask() for weight in weights]
    for weight in weights:
        weight.lora_B.data.normal_(std=0.3)
    with torch.no_grad():
        want = model(x)
    merged, dropped = slope_fx.densify(model), slope_fx.densify(model, "drop")
    assert is_plain(merged)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), want, rtol=1e-4, atol=1e-4)
    for weight, mask in zip(weights, masks, strict=True):
        path, _, _ = weight.name.rpartition(".")
        zeros = sum(int((p == 0).sum()) for p in dropped.parameters())
        assert zeros >= int((~mask).sum()), path
    again = slope_fx.densify(model, "drop", inplace=True)
    assert again is model
    assert type(model) is kind
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


def test_dropped_has_zeros_in_place():
    model = adapted("llama")
    weights = slope_fx.sparse_weights(model)
    masks = {name: weight.forward_mask() for name, weight in weights.items()}
    values = {name: weight.to_dense() for name, weight in weights.items()}
    dense = slope_fx.densify(model, adapters="drop", inplace=True)
    assert dense is model
    assert is_plain(dense)
    for name, mask in masks.items():
        weight = dense.get_submodule(name).weight
        assert torch.equal(weight, values[name])
        assert not weight[~mask].any()
    slope_fx.compile(dense, "2:4", **BACKEND)  # and back: nothing is lost
    for name, weight in slope_fx.sparse_weights(dense).items():
        assert torch.equal(weight.to_dense(), values[name])


def test_adapters_that_have_not_begun_are_not_merged():
    model = adapted(active=False)
    want = logits(model)
    torch.testing.assert_close(logits(slope_fx.densify(model)), want, rtol=1e-4, atol=1e-5)


def test_a_dense_model_trains():
    dense = slope_fx.densify(adapted()).train()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = models.loss_of(dense, batch(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", [pytest.param("gpt2", marks=pytest.mark.full), "llama", "opt"])
def test_a_peft_adapter_on_the_dense_checkpoint_gives_the_same_logits(kind, tmp_path):
    """By another process that never imports slope_fx."""
    model = adapted(kind)
    want = logits(model)
    slope_fx.densify(model, "drop").save_pretrained(tmp_path / "dense")
    slope_fx.export_peft(model, tmp_path / "adapter", base_model="dense")
    program = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "dense")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
ids = torch.tensor({batch(3).tolist()})
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, {str(tmp_path / "logits.pt")!r})
assert "slope_fx" not in sys.modules
"""
    if kind == "gpt2":  # once in full: a process takes its time to start
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
        got = torch.load(tmp_path / "logits.pt")
    else:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        got = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "dense"
    assert config["fan_in_fan_out"] == (kind == "gpt2")


def test_kept_as_a_peft_adapter():
    """Ranks that differ from layer to layer, and a PEFT model that trains."""
    torch.manual_seed(0)
    model = slope_fx.compile(
        models.llama(), "2:4", adapter_rank=0.1, adapter_init="svd", **BACKEND
    ).eval()
    assert len({weight.rank for weight in slope_fx.sparse_weights(model).values()}) > 1
    want = logits(model)
    kept = slope_fx.densify(model, "peft")
    torch.testing.assert_close(logits(kept), want, rtol=1e-4, atol=1e-5)
    trainable = [n for n, p in kept.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_layers_whose_names_end_alike_are_told_apart(tmp_path):
    """PEFT takes a name for the end of any path; a dense layer must not get an adapter."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.blk = nn.Linear(16, 16), Inner()
            self.other = nn.ModuleDict({"blk": Inner()})

        def forward(self, x):
            return self.fc(self.other["blk"].fc(self.blk.fc(x)))

    model = slope_fx.compile(
        Net(), {"other*": None, "*": "2:4"}, adapter_rank=2, adapter_init="svd", skip_first=False,
        skip_head=False, example_inputs=torch.ones(2, 16), **BACKEND,
    )  # fmt: skip
    kept = slope_fx.densify(model, "peft")
    adapted = {n.split(".lora_A")[0] for n, _ in kept.named_parameters() if "lora_A" in n}
    assert adapted == {"base_model.model.fc", "base_model.model.blk.fc"}


def test_what_peft_refuses_in_a_model_is_refused_by_us(tmp_path):
    """LoRA on a Mamba's out_proj, whose kernels read the weight past PEFT's layer."""
    model = slope_fx.compile(made("Mamba"), adapter_rank=4, backend=None)
    slope_fx.Schedule(model, 10, adapter_start=0.0)
    for attempt in (
        lambda: slope_fx.densify(model, "peft"),
        lambda: slope_fx.export_peft(model, tmp_path / "adapter"),
    ):
        with pytest.raises(
            slope_fx.errors.UnsupportedError, match=r"out_proj.*densify\(model, 'merge'\)"
        ):
            attempt()
    assert not (tmp_path / "adapter").exists()


def test_what_peft_cannot_have_is_refused(tmp_path):
    with pytest.raises(slope_fx.errors.UnsupportedError, match="no adapters that take part"):
        slope_fx.export_peft(adapted(active=False), tmp_path / "a")

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            return x @ self.w

    model = slope_fx.compile(
        Bare(), "2:4", adapter_rank=2, adapter_init="svd", example_inputs=torch.ones(2, 16),
        skip_first=False, skip_head=False, **BACKEND,
    )  # fmt: skip
    for call in (lambda: slope_fx.export_peft(model, tmp_path / "a"),
                 lambda: slope_fx.densify(model, "peft", inplace=True)):  # fmt: skip
        with pytest.raises(
            slope_fx.errors.UnsupportedError, match="w is not the weight of a linear module"
        ):
            call()
    assert slope_fx.sparse_weights(model)
    assert not (tmp_path / "a").exists()
    with pytest.raises(slope_fx.errors.ArgumentError, match="adapters='fuse'"):
        slope_fx.densify(model, "fuse")
    with pytest.raises(slope_fx.errors.StateError):
        slope_fx.densify(Bare())


def test_a_weight_without_its_layer_does_not_disturb_another_model():
    """A sparse weight outlives its layer until it is collected; other models compile meanwhile."""
    gone = slope_fx.compile(
        models.Plain(), example_inputs=torch.ones(2, 8), adapter_rank=2, **BACKEND
    )
    kept = list(slope_fx.sparse_weights(gone).values())
    slope_fx.densify(gone, inplace=True)
    model = slope_fx.compile(models.gpt2(), **BACKEND)
    loss_of(model, batch()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert slope_fx.explain(model).sparse
    assert not any(weight.installed for weight in kept)
