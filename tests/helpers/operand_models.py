"""Models and changes of their weights, to test the operands that engines keep.

The engine is cuSPARSELt with the stand-in of ``fake_cusparselt.py``.
"""

import torch
from torch import nn

import formulas
import slope_fx
from slope_fx.kernels import conversions
from strategies import normal

B16 = torch.bfloat16


def layer(pattern, d_out, d_in, seed, dtype=B16):
    n, m = pattern.n, pattern.m
    weight = normal((d_out, d_in), seed, dtype)
    forward = conversions.magnitude_mask(weight, n, m)
    values = conversions.compress(weight, forward, n, m)
    return values, forward, conversions.backward_mask(values, forward, n, m)


class DataWriter(torch.optim.Optimizer):
    """Writes to ``.data``, as many optimizers do: no version shows it."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad.data, alpha=-0.5)


class Net(nn.Module):
    """Awkward widths; the first linear isn't fed by an embedding, the last not the whole."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def compiled(backend="aot_eager", **more):
    torch.manual_seed(0)
    net = Net().to(B16)
    example = torch.zeros(4, 24, dtype=B16)
    return slope_fx.compile(
        net, example_inputs=example, backend=backend, skip_first=False, skip_head=False, **more
    )


def assert_fresh(net, seed=0):
    """Output and gradients as the formulas have them for the weights as they are now."""
    plain = formulas.formula_model(Net(), net)
    x = normal((5, 24), seed, B16)
    got_x, want_x = x.clone().requires_grad_(), x.double().requires_grad_()
    net.zero_grad()
    got, want = net(got_x), plain(want_x)
    got.float().square().sum().backward()
    want.square().sum().backward()
    for a, b in ((got, want), (got_x.grad, want_x.grad)):
        assert (a.double() - b).abs().max() <= 0.03 * b.abs().max()


def train_step(net, optimizer):
    optimizer.zero_grad()
    net(normal((5, 24), 9, B16)).float().square().sum().backward()
    optimizer.step()


def scaled(net):
    return {k: v * 1.5 if v.is_floating_point() else v for k, v in net.state_dict().items()}


def values_of(net):
    return next(iter(slope_fx.sparse_weights(net).values())).values


def edit(change):
    def apply(net):
        with torch.no_grad():
            change(values_of(net))

    return apply


CHANGES = {
    "in place": edit(lambda v: v.mul_(-2)),
    "one element": edit(lambda v: v[0, 0].add_(8)),
    "by copy": edit(lambda v: v.copy_(v.flip(0))),
    "through a view": edit(lambda v: v.view(-1)[:6].neg_()),
    "through detach": lambda net: values_of(net).detach().mul_(-2),
    "to new memory": lambda net: setattr(values_of(net), "data", values_of(net).data * -2),
    "foreach": edit(lambda v: torch._foreach_mul_([v], -2.0)),
    "init": lambda net: nn.init.normal_(values_of(net)),
    "AdamW": lambda net: train_step(net, torch.optim.AdamW(net.parameters(), lr=0.3)),
    "fused AdamW": lambda net: train_step(
        net, torch.optim.AdamW(net.parameters(), lr=0.3, fused=True)
    ),
    "an optimizer writing to .data": lambda net: train_step(
        net, DataWriter([p for p in net.parameters() if p.requires_grad])
    ),
    "load_state_dict": lambda net: net.load_state_dict(scaled(net)),
    "load_state_dict, assigned": lambda net: net.load_state_dict(scaled(net), assign=True),
    "to fp16 and back": lambda net: net.half().to(B16),
}
