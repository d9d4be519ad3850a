"""Each pass on graphs of its own: op counts before and after, equal results, idempotence."""

import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import slope_fx
from pass_graphs import D_IN, FORMS, M, N, apply, assert_same, capture, counts, inputs, program, run
from slope_fx.ops.targets import (
    ADD_ADAPTER,
    EXPAND,
    FROZEN_EXPAND,
    FROZEN_LINEAR,
    FROZEN_LINEARS,
    SPARSE_LINEAR,
)
from slope_fx.passes import NAMES, PASSES
from slope_fx.passes.markers import MARKERS
from strategies import seeds


def before(name):
    """The passes that come ahead of one."""
    return NAMES[: NAMES.index(name)]


def adapted(form):
    return program(form, True)


def twice(x, values, forward, backward, bias, a, b):
    """A weight that is read twice, and once for nothing."""
    one, two, _ = (EXPAND(values, forward, backward, N, M) for _ in range(3))
    return F.linear(x, one) + F.linear(x * 2, two, bias)


def attention(x, values, forward, backward, bias, a, b):
    """torch's own, with weights made of the one there is."""
    w = EXPAND(values, forward, backward, N, M)
    packed, out = torch.cat([w[:, :8]] * 3), w[:, 8:]
    h = x[:, None, :8]
    packed_bias = torch.cat([bias] * 3)
    mask = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)
    y, weights = F.multi_head_attention_forward(
        h, h, h, 8, 2, packed, packed_bias, None, None, False, 0.0, out, bias, attn_mask=mask
    )
    return y.squeeze(1) + weights.sum() * F.linear(x, w)


def frozen(x, values, forward, backward, bias, a, b):
    """Two linears: of the whole weight, and of its last rows by ``@``."""
    w = FROZEN_EXPAND(values, forward, None, a, b, [N, M, 0, 0, 0, D_IN, 0, 1])
    return F.linear(x, w, bias) + F.pad(x @ w[4:].T, (0, 4))


def frozen_side_by_side(x, values, forward, backward, bias, a, b):
    """Products with one input: with two forms, and one with a bias, that stays alone."""
    forms = [N, M, 0, 0, 0, D_IN, 0, 1], [N, M, 0, 0, 0, D_IN, 0, 1, 4, 2]
    y, z = (FROZEN_LINEAR(x, values, forward, None, None, a, b, form) for form in forms)
    return y + 2 * z.sin() + FROZEN_LINEAR(x, values, forward, None, bias, a, b, forms[0])


LINEAR, MHA = F.linear, F.multi_head_attention_forward
CASES = {
    "prune_expands": (twice, {EXPAND: -2}, True),
    "decompose_attention": (attention, {MHA: -1, LINEAR: 2}, True),
    "normalize_linears": (program(FORMS["@ of .T"], False), {operator.matmul: -1, LINEAR: 1}, True),
    "insert_adapters": (
        adapted(FORMS["linear"]), {ADD_ADAPTER: -1, LINEAR: 2, operator.add: 1, operator.mul: 1},
        True,
    ),
    "sparsify_linears": (
        program(FORMS["linear"], False), {EXPAND: -1, LINEAR: -1, SPARSE_LINEAR: 1}, True,
    ),
    "freeze_linears": (frozen, {FROZEN_EXPAND: -1, LINEAR: -2, FROZEN_LINEAR: 2}, False),
    "join_linears": (frozen_side_by_side, {FROZEN_LINEAR: -2, FROZEN_LINEARS: 1}, False),
}  # fmt: skip
"""Of each pass: a program it has work in, what that does to the counts, whether it trains."""


def test_each_pass_is_tested():
    assert tuple(CASES) == NAMES
    assert all(p.does and p.here for p in PASSES)


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_by_itself(name):
    """Op counts before and after, equal results, and nothing more to do the second time."""
    function, changes, training = CASES[name]
    arguments = inputs()
    with torch.set_grad_enabled(training):
        gm = capture(function, arguments)
        want = run(gm, arguments)
        if before(name):
            apply(gm, *before(name), training=training)
        old = counts(gm)
        assert apply(gm, name, training=training) >= 1
        new = counts(gm)
        changed = {t: new.get(t, 0) - old.get(t, 0) for t in {*old, *new}}
        assert {t: changed.get(t, 0) for t in changes} == changes
        assert_same(run(gm, arguments), want)
        code = gm.code
        assert apply(gm, name, training=training) == 0
        assert gm.code == code


@pytest.mark.inductor
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "sparsify_linears" else pytest.mark.full) for n in NAMES],
)
def test_a_pass_through_inductor(name):
    """Its graph as users run it: Inductor fuses what passes write, and may drop a part of it."""
    function, _, training = CASES[name]
    rewritten = []
    backend = slope_fx.rewriting_backend("inductor", "dense", passes=[..., rewritten.append])
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)

    def results(call):
        leaves = [
            t.detach().float().requires_grad_() if t.is_floating_point() else t for t in inputs()
        ]
        with torch.set_grad_enabled(training):
            out = call(*leaves)
        if training:
            out.sin().sum().backward()
        return [out.detach(), *(t.grad for t in leaves if t.requires_grad)]

    for mine, expected in zip(results(compiled), results(function), strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            error = (mine - expected).abs().max() / expected.abs().max()
            assert error < 1e-5
    marked = {"decompose_attention": 1}.get(name, 0)  # a mask that is added to its weight
    assert sum(counts(gm).get(t, 0) for gm in rewritten for t in MARKERS) == marked


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_leaves_foreign_graphs_alone(name):
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
            self.w, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 4)

        def forward(self, x):
            h = self.layer(x) @ self.w + self.head.bias.sum()
            return torch.einsum("bti,oi->bto", h, self.w) + self.head(h).sum() + self.head(h).mean()

    gm = capture(Foreign(), [torch.randn(2, 3, 8)])
    code = gm.code
    assert apply(gm, name) == 0
    assert apply(gm, name, training=False) == 0
    assert gm.code == code


@settings(max_examples=10)
@given(st.sampled_from(NAMES), seeds, st.integers(1, 5), st.integers(0, 3))
def test_a_pass_keeps_the_numbers(name, seed, tokens, more):
    """On graphs that mix its program with others, after each pass up to it and beyond."""
    function, _, training = CASES[name]
    mixed = [function, *[CASES[other][0] for other in NAMES[more :: max(more, 2)]]]

    def program(*arguments):
        return sum(part(*arguments).sin() for part in mixed)

    arguments = inputs(seed, tokens)
    with torch.set_grad_enabled(training):
        gm = capture(program, arguments)
        want = run(gm, arguments)
        for step in NAMES:
            apply(gm, step, training=training)
            assert_same(run(gm, arguments), want)


@torch.library.custom_op("slope_fx_tests::double_in_place", mutates_args=("x",))
def double_in_place(x: torch.Tensor) -> None:
    x.mul_(2)


@pytest.mark.parametrize(
    "write",
    [lambda x: x.mul_(2), lambda x: x.t()[:1].zero_(), double_in_place],
    ids=["in place", "through a view", "a custom op"],
)
def test_an_input_that_changes_is_read_again(write):
    """A linear after a write is not joined with one before it."""

    def function(x, values, forward, *others):
        x = x.clone()
        form = [N, M, 0, 0, 0, D_IN, 0, 1]
        y = FROZEN_LINEAR(x, values, forward, None, None, None, None, form)
        write(x)
        return y + FROZEN_LINEAR(x, values, forward, None, None, None, None, form)

    arguments = inputs()
    with torch.no_grad():
        gm = capture(function, arguments)
        assert apply(gm, "join_linears", training=False) == 0
        assert_same(run(gm, arguments)[:1], [function(*arguments)])
