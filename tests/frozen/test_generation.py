"""``generate`` on a frozen model through Inductor: each way to decode, and what it compiles."""

import pytest
import torch
from torch._dynamo.utils import counters

import slope_fx
from models import awake, batch, gpt2, llama
from slope_fx.errors import ArgumentError, StateError

pytestmark = pytest.mark.inductor
FULL = pytest.mark.full


def models(make=llama, **options):
    """A frozen model with adapters that are large, and the dense model of the same weights."""
    torch.manual_seed(0)
    model = awake(make(), **options)
    dense = slope_fx.densify(model)
    return slope_fx.freeze(model), dense


def assistant() -> torch.nn.Module:
    torch.manual_seed(1)
    return llama(1)


WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
    "assisted": {"do_sample": False},
}


@pytest.mark.full
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_each_way_to_decode_writes_what_the_dense_model_writes(make, rows, cache):
    """Prompts of one length, and padded on the left."""
    frozen, dense = models(make)
    ids = batch(3, rows, 5)
    padded = torch.ones_like(ids)
    padded[: rows // 2, :2] = 0
    told = {"return_dict_in_generate": True, "output_scores": True}
    for way, options in WAYS.items():
        more = {**options, "max_new_tokens": 6, "pad_token_id": 0}
        if way == "assisted":
            if rows > 1 or cache == "static" or make is not llama:
                continue  # transformers: one sequence, and a cache that can be cut
            more["assistant_model"] = assistant()
        elif not (way == "beams" and cache == "static"):  # it can't reorder a static cache
            more["cache_implementation"] = cache
        for mask in (torch.ones_like(ids), padded):
            found = []
            for model in (frozen, dense):
                torch.manual_seed(5)
                found.append(model.generate(ids, attention_mask=mask, **more, **told))
            got, want = found
            if way == "beams":  # of beams that are nearly as good, rounding drops one
                apart = (got.sequences_scores - want.sequences_scores).abs()
                assert (apart > 1e-5).sum() <= rows // 32
                assert apart.max() < 0.05
            else:
                assert got.sequences.tolist() == want.sequences.tolist(), way


def test_a_warm_up_up_to_the_last_position():
    """gpt2 has a table of positions: past its end there is an IndexError."""
    model = slope_fx.freeze(awake(gpt2(), backend=None))
    limit = model.config.max_position_embeddings
    options = {"cache_implementation": "static", "do_sample": False}
    for length in (limit - 10, limit - 9, limit - 6):
        assert slope_fx.warm_up(model, length=length, **options) > 0
    with pytest.raises(ArgumentError, match=rf"length={limit - 5}, tokens=6: .* {limit} positions"):
        slope_fx.warm_up(model, length=limit - 5, **options)


@pytest.mark.parametrize(
    ("backend", "cache"),
    [
        pytest.param("aot_eager", "static", marks=FULL),
        pytest.param("inductor", "static", marks=FULL),
        pytest.param("inductor", "dynamic", marks=FULL),
    ],
)
def test_after_a_warm_up_nothing_compiles(backend, cache):
    """For other lengths and larger batches neither. No graph is broken.

    A prefill and a decoding step have a graph each, and these twice: Dynamo compiles for the first
    sizes, and when they change, for all; a batch of 1 has graphs of its own.
    """
    frozen, _ = models(backend=backend)
    options = {"cache_implementation": cache, "do_sample": False}
    counters.clear()
    seconds = slope_fx.warm_up(frozen, batch=(1, 3), length=6, **options)
    assert seconds > 0
    made = counters["stats"]["unique_graphs"]
    assert 0 < made <= 8
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, length, tokens in [(1, 6, 6), (1, 9, 12), (3, 4, 8), (5, 11, 7), (16, 7, 3)]:
            frozen.generate(batch(1, rows, length), max_new_tokens=tokens, **options)
    assert counters["stats"]["unique_graphs"] == made


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch": 0}, "batch=0; allowed is a whole number from 1 up"),
        ({"batch": (2, 1.5)}, r"batch=1\.5"),
        ({"length": -1}, "length=-1"),
    ],
)
def test_bad_arguments_of_warm_up(arguments, said):
    with pytest.raises(ArgumentError, match=said):
        slope_fx.warm_up(awake(llama(), backend=None), **arguments)


def test_warm_up_refuses_what_cannot_generate():
    with pytest.raises(StateError, match=r"slope_fx\.compile"):
        slope_fx.warm_up(llama())
    plain = slope_fx.compile(
        torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)), backend=None,
        example_inputs=torch.randn(2, 32), skip_first=False, skip_head=False,
    )  # fmt: skip
    with pytest.raises(ArgumentError, match=r"has no generate\(\)"):
        slope_fx.warm_up(plain)
