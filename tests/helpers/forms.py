"""Layers that write a linear in every way that is supported: (batch, time, WIDTH) to the same.

Each holds its weights as parameters of its own, so that layers of a kind can share them.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations import moe as moe  # registers the op that Experts calls
from transformers.pytorch_utils import Conv1D

WIDTH = 16
HEADS, EXPERTS = 2, 3


def weight(*shape):
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


class Written(nn.Module):
    """A layer of one weight ``w`` and a bias, and what it computes of them."""

    def __init__(self, shape, function):
        super().__init__()
        self.w, self.bias = weight(*shape), nn.Parameter(torch.randn(WIDTH))
        self.function = function

    def forward(self, x):
        return self.function(x, self.w, self.bias)


class Hidden(nn.Module):
    """A layer in a checkpointed region, which is a graph of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if x.dtype == torch.float64:  # the formulas', whose mode a recomputation would miss
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=False)


class Experts(nn.Module):
    """A mixture: each token through one expert, by a grouped product; weights as transformers'."""

    def __init__(self):
        super().__init__()
        self.up, self.down = weight(EXPERTS, 2 * WIDTH, WIDTH), weight(EXPERTS, WIDTH, 2 * WIDTH)

    def forward(self, x):
        tokens = x.reshape(-1, WIDTH)
        which = (torch.arange(tokens.shape[0], device=x.device) * 7) % EXPERTS
        order = which.argsort(stable=True)
        ends = (which[None] <= torch.arange(EXPERTS, device=x.device)[:, None]).sum(1).int()
        h = grouped(tokens[order], self.up.transpose(1, 2), ends)
        h = grouped(h.relu(), self.down.transpose(1, 2), ends)
        return h[order.argsort()].view_as(x)


def grouped(x, w, ends):
    if x.dtype == torch.float64:  # the formulas' dtype, for which torch has no grouped product
        parts = x.tensor_split(ends[:-1].tolist())
        return torch.cat([part @ w[i] for i, part in enumerate(parts)])
    return torch.ops.transformers.grouped_mm_fallback(x, w, offs=ends)


class Attention(nn.Module):
    """torch's own, on itself or on another sequence."""

    def __init__(self, batch_first, cross, **more):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **more)
        self.cross = cross

    def forward(self, x):
        memory = x.flip(1) if self.cross else x
        time = torch.arange(x.shape[1 if self.attention.batch_first else 0], device=x.device)
        mask = time[None] > time[:, None]
        return self.attention(x, memory, memory, attn_mask=mask, need_weights=self.cross)[0]


def for_each(x):
    """The same tokens for each of a stack."""
    return x.flatten(0, 1).expand(EXPERTS, -1, -1)


W = WIDTH
FORMS = {
    "Linear": lambda: nn.Linear(W, W),
    "Conv1D": lambda: Conv1D(W, W),
    "F.linear": lambda: Written((W, W), lambda x, w, b: F.linear(x, w, b)),
    "x @ w": lambda: Written((W, W), lambda x, w, b: x @ w + b),
    "x @ w.T": lambda: Written((W, W), lambda x, w, b: x @ w.T),
    "w @ x": lambda: Written((W, W), lambda x, w, b: (w @ x.mT).mT + b),
    "addmm": lambda: Written((W, W), lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).view_as(x)),
    "scaled addmm": lambda: Written(
        (W, W),
        lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t(), beta=0.5, alpha=2).view_as(x),
    ),
    "mv": lambda: Written((W, W), lambda x, w, b: x + torch.mv(w, x[0, 0])),
    "einsum": lambda: Written((W, W), lambda x, w, b: torch.einsum("bti,oi->bto", x, w) + b),
    "einsum of the weight first": lambda: Written(
        (W, W), lambda x, w, b: torch.einsum("oi,...i->...o", w, x)
    ),
    "einsum by heads": lambda: Written(
        (HEADS, W // HEADS, W), lambda x, w, b: torch.einsum("btd,hkd->bthk", x, w).flatten(2) + b
    ),
    "einsum from heads": lambda: Written(
        (HEADS, W // HEADS, W),
        lambda x, w, b: torch.einsum("bthk,hkd->btd", x.unflatten(-1, (HEADS, -1)), w),
    ),
    "einsum of a stack": lambda: Written(
        (EXPERTS, W, W),
        lambda x, w, b: torch.einsum("ebti,eio->ebto", x.expand(EXPERTS, *x.shape), w).mean(0),
    ),
    "tensordot": lambda: Written((W, W), lambda x, w, b: torch.tensordot(x, w, dims=1)),
    "inner": lambda: Written((W, W), lambda x, w, b: torch.inner(x, w)),
    "bmm": lambda: Written(
        (EXPERTS, W, W),
        lambda x, w, b: torch.bmm(for_each(x), w).mean(0).view_as(x) + b,
    ),
    "baddbmm": lambda: Written(
        (EXPERTS, W, W),
        lambda x, w, b: torch.baddbmm(b, for_each(x), w.mT).mean(0).view_as(x),
    ),
    "one input, all of a stack": lambda: Written(
        (EXPERTS, W, W), lambda x, w, b: torch.matmul(x.flatten(0, 1), w).mean(0).view_as(x)
    ),
    "one of a stack": lambda: Written(
        (EXPERTS, W, W), lambda x, w, b: F.linear(F.linear(x, w[0], b), w[2])
    ),
    "rows": lambda: Written(
        (3 * W, W),
        lambda x, w, b: F.linear(x, w[:W]) + F.linear(x, w.chunk(3)[1], b) * F.linear(x, w[32:]),
    ),
    "a cast": lambda: Written((W, W), lambda x, w, b: F.linear(x, w.to(x.dtype))),
    "a view": lambda: Written((W * W,), lambda x, w, b: F.linear(x, w.view(W, W), b)),
    "1x1 convolution": lambda: Written((W, W, 1), lambda x, w, b: F.conv1d(x.mT, w, b).mT),
    "2-d convolution": lambda: Written(
        (W, W, 1, 1), lambda x, w, b: F.conv2d(x.mT.unsqueeze(-1), w).squeeze(-1).mT
    ),
    "checkpointed": lambda: Hidden(nn.Linear(W, W)),
    "experts": Experts,
    "attention": lambda: Attention(True, False),
    "attention, time first": lambda: Attention(False, False, bias=False),
    "attention on another": lambda: Attention(True, True, kdim=W, vdim=W),
    "attention with extras": lambda: Attention(True, True, add_bias_kv=True, add_zero_attn=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(W, HEADS, 2 * W, 0.0, batch_first=True),
    "decoder layer": lambda: Decoder(),
}  # fmt: skip


class Decoder(nn.Module):
    """torch's decoder layer, on a sequence and itself turned round."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(
            W, HEADS, 2 * W, 0.0, batch_first=True, norm_first=True, activation="gelu"
        )

    def forward(self, x):
        return self.layer(x, x.flip(1))


class Mixture(nn.Module):
    """Layers one after the other, residual, between a first linear and a head that stay dense."""

    def __init__(self, forms, shared=()):
        super().__init__()
        self.first, self.head = nn.Linear(W, W), nn.Linear(W, 4)
        self.layers = nn.ModuleList(FORMS[form]() for form in forms)
        for one, other in shared:
            mine, theirs = (self.layers[i]._parameters for i in (one, other))
            for name in [name for name in mine if mine[name] is not None]:
                mine[name] = theirs[name]

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + F.layer_norm(layer(x), (W,))
        return self.head(x)
