"""The pipeline beside other features of torch: autocast, checkpoints, vmap and the caches."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import slope_fx
from formulas import formula_model
from pipeline_cases import X, compiled


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
