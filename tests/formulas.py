"""METHOD's formulas in float64, on dense weights and bool masks, sharing no code with slope_fx.

``formula_model`` puts them into a plain eager model, so that a whole compiled model can
be held against them, loss and gradients.
"""

import copy

import torch
from torch import Tensor, nn

TABLE = {"1:2": 0.12500, "2:4": 0.09375, "2:8": 0.05840}
"""METHOD: extra zeros of the second pruning of a random mask, as a fraction of all elements."""


def top_n_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """The n largest of each m consecutive elements of a row, ties to the lower index."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for r, row in enumerate(scores.tolist()):
        for g in range(0, len(row), m):
            order = sorted(range(g, g + m), key=lambda c: (-row[c], c))
            mask[r, order[:n]] = True
    return mask


def backward_mask(weight: Tensor, forward: Tensor, n: int, m: int) -> Tensor:
    """METHOD, "Masks": the top N magnitudes of W^R in each group along d_out, and no pruned one."""
    scores = torch.where(forward, weight.double().abs(), torch.full_like(weight.double(), -1))
    return top_n_mask(scores.t(), n, m).t() & forward


class SlopeProduct(torch.autograd.Function):
    """``Y = X (W^R)^T``, ``grad_X = grad_Y W^{R,C}``, ``grad_W = grad_Y^T X`` where kept."""

    @staticmethod
    def forward(ctx, x, weight, forward_mask, backward_mask):
        ctx.save_for_backward(x, weight, forward_mask, backward_mask)
        return x @ (weight * forward_mask).t()

    @staticmethod
    def backward(ctx, grad):
        x, weight, forward_mask, backward_mask = ctx.saved_tensors
        flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return grad @ (weight * backward_mask), (flat_grad.t() @ flat_x) * forward_mask, None, None


class FormulaLinear(nn.Module):
    """A linear that computes the formulas in float64."""

    def __init__(self, sparse, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(sparse.to_dense().detach().double().clone())
        self.forward_mask, self.backward_mask = sparse.forward_mask(), sparse.backward_mask()
        self.bias = None if bias is None else nn.Parameter(bias.detach().double().clone())
        self.scale = sparse.scale if sparse.adapter_active else None
        if self.scale is not None:
            self.lora_A = nn.Parameter(sparse.lora_A.detach().double().clone())
            self.lora_B = nn.Parameter(sparse.lora_B.detach().double().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = SlopeProduct.apply(x, self.weight, self.forward_mask, self.backward_mask)
        if self.bias is not None:
            y = y + self.bias
        if self.scale is not None:
            y = y + self.scale * ((x @ self.lora_A.t()) @ self.lora_B.t())
        return y


def formula_model(dense: nn.Module, compiled: nn.Module) -> nn.Module:
    """``dense`` in float64, with the weights of ``compiled`` and the formulas in its linears.

    Args:
        dense: the model as it was before ``compile``.
        compiled: the compiled model; each sparse weight belongs to a module of its own.
    """
    import slope_fx

    model = copy.deepcopy(dense).double()
    weights = slope_fx.sparse_weights(compiled)
    kept = dict(compiled.named_parameters())
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data.copy_(kept[name].data)
        else:
            assert name.removesuffix(".weight") in weights, name
    for name, sparse in weights.items():
        parent, _, child = name.rpartition(".")
        bias = compiled.get_submodule(name).bias
        setattr(model.get_submodule(parent), child, FormulaLinear(sparse, bias))
    return model


def assert_gradients_match(compiled: nn.Module, formulas: nn.Module, rtol: float) -> None:
    """Each gradient of ``compiled`` within ``rtol`` of the formulas', relative to its largest."""
    import slope_fx

    weights = slope_fx.sparse_weights(compiled)
    kept = dict(compiled.named_parameters())
    # A key's bias has no gradient but rounding (softmax cancels it); it is held to the
    # scale of the others.
    floor = 0.01 * max(
        p.grad.abs().max().item() for p in formulas.parameters() if p.grad is not None
    )
    for name, parameter in formulas.named_parameters():
        layer, _, attribute = name.rpartition(".")
        if layer in weights and attribute in ("weight", "lora_A", "lora_B"):
            sparse = weights[layer]
            if attribute == "weight":
                got = sparse.values.grad
                want = parameter.grad[sparse.forward_mask()].view(got.shape)
            else:
                got, want = getattr(sparse, attribute).grad, parameter.grad
        else:
            got, want = kept[name].grad, parameter.grad
        if want is None:
            assert got is None, name
            continue
        scale = max(want.abs().max().item(), floor)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=rtol * scale, msg=name)
