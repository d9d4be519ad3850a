"""A storage format of one's own, by the recipe in CONTRIBUTING: a subclass and an entry."""

import pytest
import torch
from torch import Tensor, nn

import slope_fx
from formulas import assert_gradients_match, formula_model
from slope_fx import ops
from slope_fx.sparse import STORAGES, Storage

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


class DenseMaster(Storage):
    """The whole dense weight is kept, and what is pruned trains no further."""

    name = "master"

    def keep(self, matrix: Tensor, forward_bits: Tensor, pattern) -> Tensor:
        return matrix.clone()

    def values(self, kept: Tensor, forward_bits: Tensor, pattern) -> Tensor:
        return _Compress.apply(kept, forward_bits, pattern.n, pattern.m)

    def shape(self, rows: int, d_in: int, pattern) -> tuple[int, ...]:
        return rows, d_in


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kept, bits, n, m):
        ctx.save_for_backward(bits)
        ctx.pattern = n, m
        return ops.compress(kept, bits, n, m)

    @staticmethod
    def backward(ctx, grad):
        (bits,) = ctx.saved_tensors
        return ops.expand(grad.contiguous(), bits, bits, *ctx.pattern), None, None, None


def net():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])


@pytest.fixture
def master(monkeypatch):
    monkeypatch.setitem(STORAGES, "master", DenseMaster())


def test_a_new_format_trains_saves_and_reads(master, tmp_path):
    dense = net()
    model = slope_fx.compile(
        net(), storage="master", adapter_rank=2, example_inputs=X, backend="aot_eager",
        on_fallback="error",
    )  # fmt: skip
    slope_fx.Schedule(model, 1, adapter_start=0.0)
    weights = slope_fx.sparse_weights(model)
    for weight in weights.values():
        weight.lora_B.data.normal_()
        assert weight.values.shape == (16, 16)
    reference = formula_model(dense, model)
    y, want = model(X), reference(X.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    want.sum().backward()
    for name, weight in weights.items():
        grad, kept = reference.layers[name][0].grad, weight.forward_mask()
        got = weight.values.grad
        torch.testing.assert_close(got[kept].double(), grad[kept], rtol=1e-4, atol=1e-4)
        assert not got[~kept].any()
    row = slope_fx.explain(model).sparse[0]
    own = [weights[row.name].values, *weights[row.name].parameters()]
    assert row.bytes_after == sum(p.numel() * p.element_size() for p in own)

    path = slope_fx.save_pretrained(model, tmp_path / "c")
    again = slope_fx.load_pretrained(path, net(), backend="eager")
    assert all(w.storage.name == "master" for w in slope_fx.sparse_weights(again).values())
    torch.testing.assert_close(again(X), model(X))
    merged = slope_fx.densify(model, "merge")
    torch.testing.assert_close(merged(X), model(X))


def test_a_write_goes_through_the_format(master):
    model = slope_fx.compile(net(), storage="master", example_inputs=X, backend=None)
    weight = next(iter(slope_fx.sparse_weights(model).values()))
    new = torch.randn(16, 16)
    weight.write_(new)
    assert torch.equal(weight.values, new)
    assert torch.equal(weight.to_dense(), new * weight.forward_mask())


def test_an_unknown_format_is_refused():
    with pytest.raises(slope_fx.errors.ArgumentError, match="storage='zip'; allowed are 'values'"):
        slope_fx.compile(net(), storage="zip", example_inputs=X)


def test_gradients_of_the_default_format():
    dense = net()
    model = slope_fx.compile(net(), example_inputs=X, backend="aot_eager")
    reference = formula_model(dense, model)
    model(X).sum().backward()
    reference(X.double()).sum().backward()
    assert_gradients_match(model, reference, rtol=1e-4)
