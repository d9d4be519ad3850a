"""What is compiled one by one is decided by whether graphs are equal, and meets no limit."""

import copy
import warnings

import pytest
import torch
import transformers as tf
from torch import nn

import models
import slope_fx
from architectures import ARCHITECTURES, inputs_of, logits_of
from formulas import assert_gradients_match, formula_model
from slope_fx.backend.rewriting import backend_of
from slope_fx.record import record_of


class Wide(nn.Module):
    """Two equal blocks, and 40 linears of 40 sizes beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2)
        )
        self.others = nn.ModuleList(nn.Linear(16, 16 + 4 * i) for i in range(40))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h) + sum(other(h).mean() for other in self.others)


class Mlp(nn.Module):
    def __init__(self, width: int, shift: int = 0) -> None:
        super().__init__()
        self.up, self.down, self.shift = (
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
            shift,
        )

    def forward(self, x):
        return x + self.down(self.up(x.roll(self.shift, -1)).relu())


class Chain(nn.Module):
    """Blocks in a ``nn.Sequential``, as timm has them."""

    def __init__(self, *shifts: int) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.Sequential(*(Mlp(16, shift) for shift in shifts))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)))


def swin():
    return tf.SwinForImageClassification(
        tf.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 2, 2], num_heads=[2, 2, 2],
            window_size=4, num_labels=8, hidden_dropout_prob=0.0, drop_path_rate=0.0,
        )
    )  # fmt: skip


def compiled(model, x, **more):
    more = {"backend": "aot_eager", "on_fallback": "error", "adapter_rank": 2, **more}
    model = slope_fx.compile(model, example_inputs=x, **more)
    regions = record_of(model).regions
    return model, regions, len(set(regions.kinds))


def run(model, x, dense=None):
    """A step in each phase, against the formulas; returns the graphs it took."""
    backend = backend_of(record_of(model).settings)
    before = backend.graphs
    schedule = slope_fx.Schedule(model, 2, adapter_start=0.5)
    for _ in range(2):
        model.zero_grad()
        out = logits_of(model, {"pixel_values": x}) if x.dim() == 4 else model(x)
        out.square().mean().backward()
        if dense is not None:
            oracle = formula_model(dense, model)
            oracle(x.double()).square().mean().backward()
            assert_gradients_match(model, oracle, rtol=2e-4)
        schedule.step()
        for weight in slope_fx.sparse_weights(model).values():
            weight.lora_B.data.normal_()
    return backend.graphs - before


@pytest.mark.full
def test_many_linears_beside_two_blocks():
    """One code object served all of them: eight of 42 layers ran into its limit, expanded."""
    dense, x = Wide(), torch.randn(2, 8)
    model, regions, _ = compiled(copy.deepcopy(dense), x)
    assert regions.whole  # 41 graphs for 42 modules are no gain
    assert run(model, x, dense) == 2
    torch._dynamo.reset()
    model, regions, kinds = compiled(copy.deepcopy(dense), x, region="blocks")
    assert (len(regions.paths), kinds) == (43, 42)
    assert run(model, x, dense) == 2 * 42
    assert not any(r.reason for r in slope_fx.explain(model).sparse)


def test_a_sequential_of_equal_blocks():
    dense, x = Chain(*[0] * 6), torch.randn(2, 8)
    model, regions, kinds = compiled(copy.deepcopy(dense), x)
    assert regions.paths == tuple(f"blocks.{i}" for i in range(6))
    assert kinds == 1
    assert run(model, x, dense) == 2


def test_a_dict_of_equal_blocks():
    """torchtitan names its blocks, so that a stage of a pipeline keeps their names."""

    class Named(Chain):
        def forward(self, x):
            h = self.embed(x)
            for block in self.blocks.values():
                h = block(h)
            return self.head(h)

    dense, x = Named(*[0] * 6), torch.randn(2, 8)
    dense.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(dense.blocks)})
    model, regions, kinds = compiled(copy.deepcopy(dense), x)
    assert regions.paths == tuple(f"blocks.{i}" for i in range(6))
    assert kinds == 1
    assert run(model, x, dense) == 2


def test_blocks_of_one_class_with_other_graphs():
    dense, x = Chain(0, 1, 2, 3, 4, 4), torch.randn(2, 8)
    _, regions, _ = compiled(copy.deepcopy(dense), x)
    assert regions.whole
    dense = Chain(0, 0, 1, 1, 0, 1, 0, 1)
    model, regions, kinds = compiled(copy.deepcopy(dense), x)
    assert (len(regions.paths), kinds) == (8, 2)
    assert run(model, x, dense) == 2 * 2


@pytest.mark.full
def test_more_kinds_than_the_limit_of_one_code():
    """Each block is a graph of its own, all of one class: the limit grows with their number."""
    dense, x = Chain(*range(40), 1, 2), torch.randn(2, 8)
    model, regions, kinds = compiled(copy.deepcopy(dense), x, region="blocks")
    assert (len(regions.paths), kinds) == (42, 40)
    assert run(model, x) == 2 * 40


@pytest.mark.full
def test_swins_unequal_stages_are_one_graph():
    x = torch.randn(2, 3, 32, 32)
    model, regions, _ = compiled(swin(), {"pixel_values": x})
    assert regions.whole
    assert run(model, x) == 2


@pytest.mark.parametrize(
    ("name", "more", "kinds"),
    [
        ("Llama", {}, 2),
        pytest.param("GPT-2", {}, 2, marks=pytest.mark.full),
        ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}, 8),
        pytest.param("Gemma 2", {}, 2, marks=pytest.mark.full),
        pytest.param("T5", {}, 4, marks=pytest.mark.full),
        pytest.param("BERT", {}, 3, marks=pytest.mark.full),  # with the head's own linear
    ],
)
def test_kinds_of_real_models(name, more, kinds):
    deep = {"num_hidden_layers": 8, "n_layer": 8, "num_layers": 8, "num_decoder_layers": 8}
    kind = type(ARCHITECTURES[name]())
    config = ARCHITECTURES[name]().config
    for key, value in {**deep, **more}.items():
        if key in config.to_dict():
            setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2] * 4
    model, regions, found = compiled(kind(config), None)
    assert regions.whole == (kinds == 8)
    if not regions.whole:
        assert found == kinds
        inputs = inputs_of(model)
        backend = backend_of(record_of(model).settings)
        before = backend.graphs
        logits_of(model, inputs).sum().backward()
        assert backend.graphs - before == kinds  # the estimate is what it takes


def test_a_loaded_model_has_the_regions_of_the_saved(tmp_path):
    x = torch.randn(2, 8)
    model, regions, _ = compiled(Chain(0, 0, 1, 1, 0, 1, 0, 1), x)
    slope_fx.save_pretrained(model, tmp_path / "a")
    loaded = slope_fx.load_pretrained(tmp_path / "a", model=Chain(*[0] * 8), backend="aot_eager")
    assert record_of(loaded).regions == regions


# --- caches, and routers ----------------------------------------------------------------------


def granite_moe():
    return ARCHITECTURES["GraniteMoe"]()


@pytest.mark.full
@pytest.mark.parametrize("name", ["GraniteMoe", "SwitchTransformers"])
def test_a_cache_that_forward_takes_through_its_kwargs(name):
    if name == "GraniteMoe":
        model = granite_moe()
    else:
        model = tf.SwitchTransformersForConditionalGeneration(
            tf.SwitchTransformersConfig(
                vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2,
                num_heads=2, num_experts=4, dropout_rate=0.0, decoder_start_token_id=0,
            )
        )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", slope_fx.errors.ArgumentWarning)
        model, _, _ = compiled(model, None)
    assert not record_of(model).untraced_because
    inputs = {**inputs_of(model), "labels": models.batch()[:, :8].contiguous()}
    if name == "SwitchTransformers":  # which fails without one
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    model(**inputs).loss.backward()
    if name == "GraniteMoe":
        assert any("experts" in n for n in slope_fx.sparse_weights(model))
        model.eval()
        ids = inputs["input_ids"]
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        want = slope_fx.densify(model).generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(tokens, want)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "gpt-oss", "GraniteMoe"])
def test_routers_are_dense(name):
    model, _, _ = compiled(ARCHITECTURES[name](), None)
    reports = {r.name: r for r in slope_fx.explain(model).linears}
    routers = [r for n, r in reports.items() if n.endswith(("gate", "router"))]
    assert len(routers) == 2
    assert all(r.reason.endswith("(skip_router)") for r in routers)
    assert sum("skip_router" in r.reason for r in reports.values()) == 2
    model, _, _ = compiled(ARCHITECTURES[name](), None, skip_router=False)
    assert not any("skip_router" in r.reason for r in slope_fx.explain(model).linears)


def test_a_head_that_is_ranked_is_a_head():
    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 32)

        def forward(self, x):
            logits = self.head(self.b(self.a(x)).relu())
            return logits, logits.argmax(-1)

    model, _, _ = compiled(Greedy(), torch.randn(2, 8))
    reasons = {r.name: r.reason for r in slope_fx.explain(model).linears}
    assert reasons == {"a": reasons["a"], "b": "", "head": "output head (skip_head)"}


class Named(Wide):
    """Its blocks are in a ``nn.ModuleDict``, as torchtitan has them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"block{i}": block for i, block in enumerate(self.blocks)})

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks.values():
            h = h + block(h)
        return self.head(h)


def test_blocks_in_a_module_dict():
    _, regions, _ = compiled(Named(), torch.randn(4, 8), region="blocks")
    kinds = dict(zip(regions.paths, regions.kinds, strict=True))
    assert kinds["blocks.block0"] == kinds["blocks.block1"]


def test_graphs_are_numbered_in_one_order():
    """That of the graph, so that the numbers in a checkpoint don't depend on the process."""
    torch.manual_seed(0)
    model = slope_fx.compile(Chain(1, 2, 1), example_inputs=torch.randn(2, 8), backend=None)
    paths = list(record_of(model).graphs)
    inside = [(path.rpartition(".")[0], path) for path in paths]
    pairs = [(outer, path) for outer, path in inside if outer in paths]
    assert len(pairs) > 6
    assert all(paths.index(outer) < paths.index(path) for outer, path in pairs)
    kinds = list(dict.fromkeys(record_of(model).graphs.values()))
    assert kinds == list(range(len(kinds)))
