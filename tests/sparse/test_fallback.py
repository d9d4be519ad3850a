"""A sparse layer that trains expanded is told, by name, once."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slope_fx
from formulas import assert_gradients_match, formula_model
from slope_fx.attach import _compile
from slope_fx.errors import ExpandedWeightError, ExpandedWeightWarning

X = torch.randn(3, 16)


class Broken(nn.Module):
    """Three sparse layers: one seen, one behind a graph break, one used in a way of its own."""

    def __init__(self, breaks=False, reads=False, logs=False):
        super().__init__()
        self.breaks, self.reads, self.logs = breaks, reads, logs
        self.embed = nn.Linear(16, 16)
        self.seen, self.behind, self.read = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 4)

    @torch.compiler.disable
    def uncompiled(self, h):
        return self.behind(h)

    def forward(self, x):
        h = self.seen(self.embed(x))
        h = self.uncompiled(h) if self.breaks else self.behind(h)
        h = self.read(h)
        if self.reads and not torch.compiler.is_exporting():
            h = h + self.read.weight.norm()
        if self.logs and not torch.compiler.is_exporting():
            self.last = self.read.weight.detach().norm()
        return self.head(h)


def compiled(on_fallback="warn", **flags):
    torch.manual_seed(0)
    return slope_fx.compile(
        Broken(**flags), example_inputs=X, backend="aot_eager", on_fallback=on_fallback
    )


def told(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(X).sum().backward()
    return [str(w.message) for w in caught if w.category is ExpandedWeightWarning]


def test_nothing_is_said_where_nothing_is_expanded():
    assert told(compiled()) == []


def test_a_graph_break_around_a_weight_names_its_layer_once():
    model = compiled(breaks=True)
    (message,) = told(model)
    assert message.startswith("behind: its weight was read outside of a compiled graph")
    rows = {r.name: r.reason for r in slope_fx.explain(model).sparse}
    assert "outside of a compiled graph" in rows["behind"]
    assert rows["seen"] == rows["read"] == ""
    assert "trains expanded: " in str(slope_fx.explain(model))


def test_a_use_that_no_pass_rewrites_names_its_layer_and_the_op():
    model = compiled(reads=True)
    (message,) = told(model)
    assert message.startswith("read: its weight is used by ")
    assert "norm" in message


def test_looking_at_a_weight_is_no_fallback():
    """Reading it, in the graph or out of it, isn't training through it."""
    model = compiled("error", logs=True)
    assert hasattr(model.seen, "weight")
    assert model.seen.weight.norm() > 0
    model(X).sum().backward()
    assert all(row.reason == "" for row in slope_fx.explain(model).sparse)


def test_a_frozen_layer_that_runs_expanded_is_told():
    """It gets no gradient, but passes a single-pruned one on."""
    model = compiled(breaks=True)
    model.behind.requires_grad_(False)
    (message,) = told(model)
    assert message.startswith("behind: its weight was read outside of a compiled graph")


def test_a_graph_break_inside_torchs_own_container_is_explained():
    class Breaks(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x * 2

    layers = [nn.Linear(16, 16) for _ in range(3)]
    model = nn.Sequential(*layers, Breaks(), nn.Linear(16, 4))
    slope_fx.compile(model, example_inputs=X, backend="aot_eager")
    messages = told(model)
    assert sorted(m.split(":")[0] for m in messages) == ["1", "2"]
    assert any("one of torch's containers" in m for m in messages)


def test_the_expanded_layer_still_computes_the_pruned_model():
    """The right loss and weight gradient; the input gradient is that of W^R."""
    model = compiled(on_fallback="ignore", breaks=True)
    weights = slope_fx.sparse_weights(model)
    plain = formula_model(Broken(), model)
    plain.twice_pruned["behind"] = weights["behind"].forward_mask()
    model(X).sin().sum().backward()
    plain(X.double()).sin().sum().backward()
    assert_gradients_match(model, plain, rtol=1e-4)


@pytest.mark.parametrize("flag", ["breaks", "reads"])
def test_error_raises_our_own_class(flag):
    model = compiled("error", **{flag: True})
    for _ in range(2):
        with pytest.raises(ExpandedWeightError, match=r"behind|read"):
            model(X).sum().backward()


@pytest.mark.parametrize("flag", ["breaks", "reads"])
def test_ignore_says_nothing(flag):
    assert told(compiled("ignore", **{flag: True})) == []


@pytest.mark.parametrize("flag", ["breaks", "reads"])
def test_inference_says_nothing(flag):
    model = compiled("error", **{flag: True})
    with torch.no_grad():
        assert model(X).isfinite().all()


def test_dynamo_switched_off_is_told():
    model = compiled()
    with torch.compiler.set_stance("force_eager"):
        messages = told(model)
    assert sorted(m.split(":")[0] for m in messages) == ["behind", "read", "seen"]


def test_the_recompile_limit_is_told(monkeypatch):
    monkeypatch.setattr("slope_fx.dynamo.RECOMPILE_LIMIT", 1)
    monkeypatch.setattr("slope_fx.dynamo.VARIANTS", 1)
    model = compiled()
    with torch._dynamo.config.patch(recompile_limit=1):
        _compile(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(X).sum().backward()
            model.eval()
            model(X.double().float()[:, None].squeeze(1).repeat(2, 1)).sum().backward()
            model.train()
            model(X.repeat(5, 1)).sum().backward()
    names = [str(w.message).split(":")[0] for w in caught if w.category is ExpandedWeightWarning]
    assert sorted(names) == ["behind", "read", "seen"]


def test_another_backend_is_told():
    """The user compiles the training step, with a backend that knows no passes of ours."""
    model = compiled()
    outer = torch.compile(lambda x: model(x), backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            outer(X).sum().backward()
    names = [str(w.message).split(":")[0] for w in caught if w.category is ExpandedWeightWarning]
    assert sorted(names) == ["behind", "read", "seen"]
    strict = compiled("error")
    loss = torch.compile(lambda x: strict(x), backend="aot_eager")(X).sum()
    with pytest.raises(ExpandedWeightError, match="compiled by another backend"):
        loss.backward()


def test_a_functional_linear_of_a_foreign_weight_is_none_of_our_business():
    class Model(Broken):
        def forward(self, x):
            return super().forward(x) + F.linear(x, x.t() @ x)[:, :4]

    model = slope_fx.compile(Model(), example_inputs=X, backend="aot_eager", on_fallback="error")
    model(X).sum().backward()


def test_passes_log_their_counts(caplog):
    with caplog.at_level(logging.INFO, logger="slope_fx"):
        compiled()(X)
    assert "insert_adapters 0, sparsify_linears 3" in caplog.text
    assert "left expanded 0" in caplog.text


def test_torch_logs_shows_what_each_pass_did():
    program = (
        "import torch, slope_fx; from torch import nn\n"
        "m = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])\n"
        "x = torch.randn(2, 16)\n"
        "slope_fx.compile(m, example_inputs=x, backend='eager')(x)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TORCH_LOGS": "+slope_fx"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "insert_adapters 0, sparsify_linears 2" in done.stderr
    assert "2 of 4 linears are sparse" in done.stderr
