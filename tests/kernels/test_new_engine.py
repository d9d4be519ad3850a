"""The recipe for a new engine (CONTRIBUTING.md, "Adding an engine"), followed step by step."""

import pytest
import torch
from torch import nn

import slope_fx
from slope_fx.errors import EngineWarning
from slope_fx.kernels import ENGINES, Engine, racing, selection
from slope_fx.kernels.engines import allowed_engines, say_once
from slope_fx.kernels.selection import Request, choose

CPU = torch.device("cpu")


class Mine(Engine):
    """An engine with a forward product of its own. The defaults compute the rest."""

    name = "mine"
    devices = ("cpu",)

    def __init__(self):
        self.calls = []

    def why_not(self, device, dtype):
        return "" if dtype == torch.float32 else f"it has no kernels for {dtype}"

    def sparse_linear(self, x, values, forward_mask, bias, n, m, training=False):
        self.calls.append(training)
        y = x @ self.expand(values, forward_mask, n, m).t()
        return y if bias is None else y + bias


@pytest.fixture
def mine(monkeypatch, tmp_path):
    """The engine in the list, and no choices in memory or on disk."""
    engine = Mine()
    monkeypatch.setitem(ENGINES, engine.name, engine)
    monkeypatch.setenv("SLOPE_FX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SLOPE_FX_ENGINES")
    selection.forget()
    racing.forget_disk()
    yield engine
    selection.forget()
    racing.forget_disk()


def trained(engine):
    """A compiled model after one backward pass: the model, its output and its gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    x = torch.randn(5, 16)
    net = slope_fx.compile(
        net, example_inputs=x, backend="aot_eager", engine=engine, skip_first=False, skip_head=False
    )
    y = net(x)
    y.square().sum().backward()
    return net, y.detach(), [p.grad for p in net.parameters() if p.grad is not None]


def test_a_new_engine_trains_a_compiled_model_by_its_name(mine):
    net, y, grads = trained("mine")
    assert mine.calls == [True, True]
    products = [p for report in slope_fx.explain(net).sparse for p in report.products]
    assert {p.engine for p in products} == {"mine"}
    with torch.no_grad():
        net(torch.randn(5, 16))
    assert mine.calls[2:] == [False, False]
    _, want, want_grads = trained("reference")
    torch.testing.assert_close(y, want)
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("seconds", "winner"), [(0.5, "mine"), (2.0, "cpu")])
def test_a_new_engine_competes(mine, monkeypatch, seconds, winner):
    def race(runs, device):
        for run in runs.values():
            run()
        return {name: seconds if name == "mine" else 1.0 for name in runs}, True

    monkeypatch.setattr(racing, "race", race)
    assert choose("sparse_linear", Request(8, 32, 16, 2, 4, torch.float32, CPU)) == winner
    assert mine.calls


def test_the_reason_of_a_new_engine_is_told(mine):
    say_once.cache_clear()
    request = Request(8, 32, 16, 2, 4, torch.bfloat16, CPU, engines="mine")
    with pytest.warns(EngineWarning, match=r"mine engine: it has no kernels for torch\.b"):
        assert choose("sparse_linear", request) == "dense"


def test_a_new_engine_can_stay_out_of_the_competition(mine, monkeypatch):
    monkeypatch.setattr(mine, "competes", False)
    assert "mine" not in allowed_engines()
    assert allowed_engines("mine") == ("mine",)
