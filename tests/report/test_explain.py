"""``explain`` reads the model: what it says is true of this one, however it came to be."""

import copy
import io

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import models
import slope_fx
from models import batch, loss_of


def products(model):
    loss_of(model, batch()).backward()
    return {len(row.products) for row in slope_fx.explain(model).sparse}


def test_a_model_like_another_reuses_its_code_and_is_explained_all_the_same():
    """Dynamo compiles nothing for the second; its engines are those of the first."""
    how = {"backend": "aot_eager", "engine": "cpu-dense"}
    first, second = (slope_fx.compile(models.gpt2(), **how) for _ in range(2))
    third = copy.deepcopy(first)
    file = io.BytesIO()
    torch.save(second, file)
    file.seek(0)
    fourth = torch.load(file, weights_only=False)
    assert [products(model) for model in (first, second, third, fourth)] == [{3}] * 4
    engines = {p.engine for row in slope_fx.explain(second).sparse for p in row.products}
    assert engines == {"cpu-dense"}


def test_engines_of_another_backend_are_not_this_models():
    one = slope_fx.compile(models.gpt2(), backend="aot_eager", engine="dense")
    other = slope_fx.compile(models.gpt2(), backend="aot_eager", engine="reference")
    assert products(one) == {3}
    assert all(not row.products for row in slope_fx.explain(other).sparse)
    assert products(other) == {3}
    engines = {p.engine for row in slope_fx.explain(other).sparse for p in row.products}
    assert engines == {"reference"}


def test_a_model_that_is_compiled_by_hand():
    model = slope_fx.compile(models.gpt2(), backend=None)
    backend = slope_fx.rewriting_backend("aot_eager", "cpu")
    for block in model.transformer.h:
        block.compile(backend=backend)
    assert products(model) == {3}


def test_layers_in_checkpoint_wrappers_are_counted_once():
    model = slope_fx.compile(models.llama(), {"*.q_proj": None, "*": "2:4"}, backend="aot_eager")
    before = slope_fx.explain(model).linears
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(block)
    after = slope_fx.explain(model).linears
    assert [row.name for row in after] == [row.name for row in before]
    model.extra = torch.nn.Linear(8, 8)
    (added,) = slope_fx.explain(model).linears[len(before) :]
    assert (added.name, added.reason) == ("extra", "it was added after compile")
