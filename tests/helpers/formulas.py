"""METHOD's formulas in float64, on dense weights and bool masks, sharing no code with slope_fx.

``formula_model`` computes a plain eager model with them, so that a whole compiled model can
be held against them, loss and gradients.
"""

import copy
import types as python_types

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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


VIEWS = {
    "t", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze",
    "chunk", "split", "split_with_sizes", "__getitem__", "select", "narrow", "unbind", "contiguous",
    "to", "float", "double", "movedim", "index_select",
}  # fmt: skip
PRODUCTS = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "baddbmm", "inner",
    "einsum", "tensordot", "conv1d", "conv2d", "conv3d", "_grouped_mm", "grouped_mm",
}  # fmt: skip
BIAS = {"linear": 2, "addmm": 0, "baddbmm": 0, "conv1d": 2, "conv2d": 2, "conv3d": 2}
TURNED = (torch.Tensor.T.__get__, torch.Tensor.mT.__get__)


class Formulas(torch.overrides.TorchFunctionMode):
    """METHOD's products in place of the plain ones, wherever a pruned weight is an operand.

    A product ``y = f(x, W)``, however it is written, is computed as
    ``f(x, W^R) + f(x, scale B A)``, with the gradient of ``x`` in the first term that of
    ``f(x, W^{R,C})``. Views of a weight are followed.

    Args:
        weights: parameter, its ``W^{R,C}``, and ``scale B A`` or None, all of one shape.
    """

    def __init__(self, weights: list[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        super().__init__()
        self.known = {id(weight): (weight, twice, low) for weight, twice, low in weights}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.multi_head_attention_forward:
            plain = {**func.__globals__, "has_torch_function": lambda tensors: False}
            opened = python_types.FunctionType(func.__code__, plain, None, func.__defaults__)
            with self:
                return opened(*args, **kwargs)
        name = getattr(func, "__name__", "").rpartition(".")[2]
        weights = [a for a in tree_leaves((args, kwargs)) if id(a) in self.known]
        if weights and (name in VIEWS or func in TURNED):
            results = func(*args, **kwargs)
            twice = self.call(func, args, kwargs, weights[0], self.known[id(weights[0])][1])
            low = self.known[id(weights[0])][2]
            low = None if low is None else self.call(func, args, kwargs, weights[0], low)
            parts = results if isinstance(results, (tuple, list)) else [results]
            for i, part in enumerate(parts):
                pair = (t if part is results or t is None else t[i] for t in (twice, low))
                self.known[id(part)] = (part, *pair)
            return results
        if weights and name in PRODUCTS:
            return self.product(func, name, args, kwargs, weights[0])
        return func(*args, **kwargs)

    def product(self, func, name, args, kwargs, weight):
        _, twice, low = self.known[id(weight)]
        bias = kwargs.get("bias", kwargs.get("input" if name == "addmm" else "bias"))
        if BIAS.get(name, 99) < len(args):
            bias = args[BIAS[name]]

        def cut(value):
            if isinstance(value, (tuple, list)):
                return [cut(v) for v in value]
            if isinstance(value, Tensor) and value is not weight and value is not bias:
                return value.detach()
            return value

        still, named = [cut(a) for a in args], {k: cut(v) for k, v in kwargs.items()}
        y = func(*still, **named)
        y = y + self.call(func, args, kwargs, weight, twice)
        y = y - self.call(func, still, named, weight, twice)
        if low is not None:
            y = y + self.call(func, args, kwargs, weight, low)
            y = y - self.call(func, still, named, weight, torch.zeros_like(low))
        return y

    @staticmethod
    def call(func, args, kwargs, weight, instead):
        def put(value):
            if isinstance(value, (tuple, list)):
                return type(value)(put(v) for v in value)
            return instead if value is weight else value

        return func(*[put(a) for a in args], **{k: put(v) for k, v in kwargs.items()})


class FormulaModel(nn.Module):
    """A dense model in float64, eager, whose linears compute METHOD's formulas.

    Attributes:
        layers: name of a sparse layer to its weight, forward mask, A and B.
        twice_pruned: name of a sparse layer to the mask of ``W^{R,C}``.
        names: of the other parameters.
    """

    def __init__(self, dense: nn.Module, compiled: nn.Module) -> None:
        import slope_fx

        super().__init__()
        self.model = copy.deepcopy(dense).double()
        kept = dict(compiled.named_parameters())
        own = dict(self.model.named_parameters())
        aliases = {n: p for n, p in self.model.named_parameters(remove_duplicate=False)}
        self.layers = {}
        self.twice_pruned, self.pruned = {}, []
        for name, sparse in slope_fx.sparse_weights(compiled).items():
            parameter = aliases[name if name in aliases else f"{name}.weight"]

            def like(matrix, parameter=parameter, turned=sparse.layout.transposed, of=sparse):
                stacked = matrix.reshape(of.stack, of.d_out, of.d_in)
                stacked = stacked.transpose(1, 2) if turned else stacked
                return stacked.reshape(parameter.shape)

            parameter.data.copy_(like(sparse.to_dense().double()))
            a = b = None
            if sparse.adapter_active:
                adapter = (sparse.lora_A, sparse.lora_B)
                a, b = (nn.Parameter(t.detach().double().clone()) for t in adapter)
            self.layers[name] = (parameter, like(sparse.forward_mask()), a, b)
            self.twice_pruned[name] = like(sparse.backward_mask())
            self.pruned.append((sparse, like))
        pruned = {id(p) for p, *_ in self.layers.values()}
        self.names = {}
        for name, parameter in own.items():
            if id(parameter) not in pruned:
                parameter.data.copy_(kept[name].data)
                self.names[name] = parameter

    def forward(self, *args, **kwargs):
        weights = []
        for sparse, like in self.pruned:
            weight, _, a, b = self.layers[sparse.name]
            twice, low = self.twice_pruned[sparse.name], None
            if a is not None:
                a, b = (t.unflatten(0, (sparse.stack, -1)) for t in (a, b))
                low = like(sparse.scale * torch.bmm(b, a))
            weights.append((weight, weight.detach() * twice, low))
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with Formulas(weights):
                return self.model(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def formula_model(dense: nn.Module, compiled: nn.Module) -> FormulaModel:
    """``dense`` in float64, with the weights of ``compiled`` and the formulas for its linears."""
    return FormulaModel(dense, compiled)


def assert_gradients_match(compiled: nn.Module, formulas: FormulaModel, rtol: float) -> None:
    """Each gradient of ``compiled`` within ``rtol`` of the formulas', relative to its largest."""
    errors = gradient_errors(compiled, formulas)
    wrong = {name: error for name, error in errors.items() if not error <= rtol}
    assert not wrong, wrong


def gradient_errors(compiled: nn.Module, formulas: FormulaModel) -> dict[str, float]:
    """How far each gradient is from the formulas', relative to its largest; NaN: there is none."""
    import slope_fx

    weights = slope_fx.sparse_weights(compiled)
    kept = dict(compiled.named_parameters())
    pairs = {name: (kept[name].grad, p.grad) for name, p in formulas.names.items()}
    for name, (weight, mask, a, b) in formulas.layers.items():
        sparse = weights[name]
        want = weight.grad
        if want is not None:
            if sparse.layout.transposed:
                size = (sparse.stack, sparse.d_in, sparse.d_out)
                want, mask = (t.reshape(size).transpose(1, 2) for t in (want, mask))
            want = want[mask].view(sparse.values.shape)
        pairs[f"{name}.weight"] = sparse.values.grad, want
        if a is not None:
            pairs[f"{name}.lora_A"] = sparse.lora_A.grad, a.grad
            pairs[f"{name}.lora_B"] = sparse.lora_B.grad, b.grad
    # A key's bias has no gradient but rounding (softmax cancels it); it is held to the
    # scale of the others.
    largest = [want.abs().max().item() for _, want in pairs.values() if want is not None]
    floor = 0.01 * max(largest)
    errors = {}
    for name, (got, want) in pairs.items():
        if want is None or got is None:
            errors[name] = 0.0 if got is want else float("nan")
            continue
        scale = max(want.abs().max().item(), floor)
        errors[name] = (got.double() - want).abs().max().item() / scale
    return errors
