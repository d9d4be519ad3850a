"""The pipeline as its user meets it: regions, options, own passes, what is shown of each step."""

import copy
import dataclasses
import json
import operator
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import models
import slope_fx
from formulas import assert_gradients_match, formula_model
from models import batch, loss_of
from slope_fx.backend.rewriting import backend_of
from slope_fx.passes import NAMES, PASSES
from slope_fx.record import record_of

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


def layers(count=4):
    return nn.Sequential(*[nn.Linear(16, 16) for _ in range(count)])


def compiled(model=None, **more):
    more = {"backend": "aot_eager", "on_fallback": "error", **more}
    return slope_fx.compile(model or layers(), example_inputs=X, **more)


def graphs(model):
    return backend_of(record_of(model).settings).graphs


def assert_trains_right(dense, model, x=X):
    reference = formula_model(dense, model)
    y, want = model(x), reference(x.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    want.sum().backward()
    assert_gradients_match(model, reference, rtol=1e-4)


# --- regions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.full)])
def test_auto_compiles_blocks_and_needs_no_word_about_the_cache(name):
    """Training never meets the cache; evaluation with one is compiled as a whole."""
    model = models.TRANSFORMERS[name](layers=6)
    dense = copy.deepcopy(model)
    slope_fx.compile(model, adapter_rank=2, backend="aot_eager", on_fallback="error")
    assert len(record_of(model).regions.paths) == 6
    ids, before = batch(), graphs(model)
    reference = formula_model(dense, model)
    loss_of(reference, ids).backward()
    out = model(input_ids=ids, labels=ids)
    assert out.past_key_values is None
    out.loss.backward()
    assert_gradients_match(model, reference, rtol=2e-4)
    assert graphs(model) == before + 2  # the first block, whose inputs stay dense, and the rest
    slope_fx.Schedule(model, 1, adapter_start=0.0)
    loss_of(model, ids).backward()
    assert graphs(model) == before + 4  # each once more, in the adapter phase
    model.eval()
    with torch.no_grad():
        cached = model(ids)
        assert graphs(model) == before + 5
        torch.testing.assert_close(cached.logits, model(ids, use_cache=False).logits)
    assert cached.past_key_values is not None
    tokens = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 19)
    assert "use_cache=False" in slope_fx.explain(model).note


def test_auto_compiles_a_model_without_blocks_as_a_whole():
    model = compiled()
    assert record_of(model).regions.whole
    assert "one by one" not in slope_fx.explain(model).note


# --- torch.compile's options ------------------------------------------------------------------


def test_options_reach_the_backend():
    got = []

    def inner(gm, example_inputs, **more):
        got.append(more)
        return gm.forward

    compiled(backend=inner, options={"a": 1})(X)
    compiled(backend=inner, mode="max-autotune")(X)
    assert got == [{"options": {"a": 1}}, {"mode": "max-autotune"}]


def test_options_of_inductor_are_its_own():
    settings = slope_fx.rewriting_backend(mode="reduce-overhead").settings
    assert settings.replays
    assert not slope_fx.rewriting_backend().settings.replays
    settings = slope_fx.rewriting_backend(options={"max-autotune": True}).settings
    assert settings.inductor_options() == {"max_autotune": True}
    same = slope_fx.rewriting_backend(options={"max-autotune": True})
    assert same is slope_fx.rewriting_backend(options={"max-autotune": True})
    assert same is not slope_fx.rewriting_backend(options={"max-autotune": False})
    assert copy.deepcopy(same) is same


def test_dynamic_sizes_make_one_graph():
    torch._dynamo.reset()
    model = compiled(layers(), dynamic=True)
    start = graphs(model)
    for rows in (6, 7, 9):
        model(X.repeat(2, 1)[:rows]).sum().backward()
    assert graphs(model) == start + 1


def test_fullgraph_says_where_a_graph_breaks():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers()

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.layers(x)

    model = compiled(Breaks(), fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(X)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mode": "fast"}, "mode='fast'; allowed are 'default'"),
        ({"options": {"no_such": 1}}, "'no_such'] is not an option of Inductor"),
        ({"options": [1]}, "options is a list; it must be a mapping"),
        ({"mode": "default", "options": {"max_autotune": True}}, "can't both be given"),
        ({"disable_passes": ["sparsify"]}, "disable_passes has 'sparsify'; there are prune_exp"),
        (
            {"enable_passes": ["x"]},
            "there is no argument 'enable_passes'; there are",
        ),
        ({"passes": "mine"}, "passes is a str; it must be a list"),
        ({"passes": [3]}, "passes has 3, which is neither a function"),
        ({"passes": [..., ...]}, "`...` more than once"),
        ({"region": "all"}, "region='all'; allowed are 'auto', 'model', 'blocks'"),
        ({"dynamic": 1}, "dynamic=1; allowed are True, False, None"),
    ],
)
def test_wrong_arguments_leave_the_model_as_it_was(wrong, words):
    model = layers()
    with pytest.raises(slope_fx.errors.ArgumentError) as error:
        compiled(model, **{"backend": "inductor", **wrong})
    assert words in str(error.value)
    assert not slope_fx.record.sparse_weights_in(model)


def test_without_a_backend_its_arguments_are_told():
    with pytest.warns(slope_fx.errors.ArgumentWarning, match="disable_passes=.*has no effect"):
        compiled(backend=None, disable_passes=["prune_expands"])


# --- own passes, disabled passes --------------------------------------------------------------


def test_own_passes_run_before_and_after_ours():
    seen = []

    def targets(gm):
        return [str(node.target) for node in gm.graph.nodes]

    def first(gm):
        seen.append(("first", "slope_fx.expand.default" in targets(gm)))

    def last(gm):
        seen.append(("last", "slope_fx.sparse_linear.default" in targets(gm)))
        return torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))

    dense = layers()
    model = compiled(copy.deepcopy(dense), passes=[first, ..., last])
    assert_trains_right(dense, model)
    assert seen == [("first", True), ("last", True)]
    compiled(passes=[last])(X)
    assert seen[-1] == ("last", True)


def test_an_own_pass_that_returns_nonsense_is_told():
    model = compiled(passes=[lambda gm: 3])
    with pytest.raises(Exception, match="returned a int; a pass changes its"):
        model(X)


@pytest.mark.parametrize("name", NAMES)
def test_each_pass_can_be_left_out(name):
    """The numbers are right all the same, but for what only the sparse product does."""
    dense = models.llama()
    model = slope_fx.compile(
        copy.deepcopy(dense), backend="aot_eager", disable_passes=[name], on_fallback="ignore",
    )  # fmt: skip
    ids = batch()
    reference = formula_model(dense, model)
    want, got = loss_of(reference, ids), loss_of(model, ids)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    want.backward()
    got.backward()
    if name != "sparsify_linears":
        assert_gradients_match(model, reference, rtol=2e-4)


def test_a_disabled_pass_is_named_where_a_layer_is_left():
    model = compiled(disable_passes=["sparsify_linears"], on_fallback="warn")
    with pytest.warns(
        slope_fx.errors.ExpandedWeightWarning, match="disabled passes: sparsify_linears"
    ):
        model(X).sum().backward()


# --- what is shown ----------------------------------------------------------------------------


def test_the_structured_trace_has_the_graph_around_each_pass(tmp_path):
    """As users look at it: ``TORCH_TRACE=folder``, read by tlparse."""
    program = (
        "import torch, slope_fx\n"
        "from torch import nn\n"
        "model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])\n"
        "x = torch.randn(6, 16)\n"
        "slope_fx.compile(model, example_inputs=x, backend='aot_eager')\n"
        "model(x).sum().backward()\n"
    )
    env = {**os.environ, "TORCH_TRACE": str(tmp_path), "TORCH_LOGS": "+slope_fx"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sparsify_linears: 2 matches" in done.stderr
    log = "".join(path.read_text() for path in tmp_path.iterdir())
    names = re.findall(r'"name": "slope_fx_(\w+)"', log)
    assert names == ["before_passes", "after_sparsify_linears"]
    assert "slope_fx.sparse_linear.default" in log.split("slope_fx_after_sparsify_linears")[1]


def test_debug_finds_the_pass_at_fault(monkeypatch):
    model = compiled(adapter_rank=2)
    slope_fx.Schedule(model, 1, adapter_start=0.0)
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_B.data.normal_()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert slope_fx.debug.first_difference(model, X) is None

    def wrong(gm, context):
        """Scales what the adapters add."""
        scaled = gm.graph.find_nodes(op="call_function", target=operator.mul)
        nodes = [n for n in scaled if n.args[1] == 0.5]
        for node in nodes:
            node.update_arg(1, 9.0)
        return len(nodes)

    faulty = [
        step if step.name != "sparsify_linears" else dataclasses.replace(step, run=wrong)
        for step in PASSES
    ]
    monkeypatch.setattr(slope_fx.debug, "PASSES", faulty)
    found = slope_fx.debug.first_difference(model, X)
    assert (found.name, found.graph, found.matches) == ("sparsify_linears", 0, 2)
    assert "output 0" in str(found)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(X)  # as it was before


def test_debug_refuses_what_it_cannot_look_at():
    with pytest.raises(slope_fx.errors.StateError):
        slope_fx.debug.first_difference(layers(), X)
    with pytest.raises(slope_fx.errors.ArgumentError, match="backend=None"):
        slope_fx.debug.first_difference(compiled(backend=None), X)
    with pytest.raises(slope_fx.errors.ArgumentError, match="tolerance=0"):
        slope_fx.debug.first_difference(compiled(), X, tolerance=0)


# --- what it composes with --------------------------------------------------------------------


class Composed(nn.Module):
    """A linear under autocast, one checkpointed in either way, one that is kept from Dynamo."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.cast, self.checked, self.apart, self.head = (
            nn.Linear(16, 16) for _ in range(5)
        )
        self.reentrant = reentrant

    def forward(self, x):
        h = self.first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = h + self.cast(h).float()
        if x.dtype != torch.float64:
            h = h + checkpoint(self.checked, h, use_reentrant=self.reentrant)
        else:
            h = h + self.checked(h)
        return self.head(h + self.outside(h))

    @torch.compiler.disable
    def outside(self, h):
        return self.apart(h)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_autocast_checkpoints_and_disabled_layers(reentrant):
    """The layer that Dynamo may not see is right, and told; the others are as ever."""
    dense = Composed(reentrant)
    model = compiled(copy.deepcopy(dense), on_fallback="warn")
    reference = formula_model(dense, model)
    y = model(X)
    with pytest.warns(
        slope_fx.errors.ExpandedWeightWarning, match="apart: its weight was read outside"
    ):
        y.sum().backward()
    want = reference(X.double())
    torch.testing.assert_close(y.double(), want, rtol=0.02, atol=0.02)
    reported = {n for n, w in slope_fx.sparse_weights(model).items() if w.expanded_because}
    assert reported == {"apart"}


def test_a_model_under_vmap():
    model = compiled(backend=None, on_fallback="ignore")
    with torch.no_grad():
        got = torch.func.vmap(model)(X)
        torch.testing.assert_close(got, model(X))


CACHED = """
import json, sys, torch, slope_fx
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
x = torch.randn(4, 16)
slope_fx.compile(model, example_inputs=x, engine="dense", disable_passes=sys.argv[1:])
torch.manual_seed(1)
model(x).sin().sum().backward()
c = torch._dynamo.utils.counters["aot_autograd"]
print(json.dumps([c["autograd_cache_hit"], c["autograd_cache_miss"]]))
"""


@pytest.mark.full
@pytest.mark.inductor
def test_a_second_process_hits_the_cache_and_a_changed_option_misses_it(tmp_path):
    def run(*disabled, tag=""):
        env = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "TORCH_COMPILE_CACHE_KEY_TAG": tag,
        }
        command = [sys.executable, "-c", CACHED, *disabled]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert run() == [0, 1]
    assert run() == [1, 0]
    assert run("sparsify_linears") == [0, 1]
    assert run(tag="mine") == [0, 1]  # what the user sets is a part of the key still


def test_the_cache_tells_other_gradients_apart():
    """A graph names an op, not its gradient; what a version before computed isn't taken up."""
    tags = []

    def inner(gm, example_inputs):
        tags.append(torch.compiler.config.cache_key_tag)
        return gm.forward

    compiled(backend=inner)(X)
    (tag,) = tags
    assert tag.strip() == f"slope_fx {slope_fx.backend.rewriting._cache_tag()}"
    assert torch.compiler.config.cache_key_tag == ""
