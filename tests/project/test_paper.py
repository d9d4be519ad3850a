"""The paper's bench: its arithmetic against independent counts, its runs whole on a toy."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fake_cusparselt as fake
import slope_fx
from slope_fx.kernels import racing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    """The modules of benchmarks/ and docs/, importable."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "docs"))


def small(family):
    from shapes import Architecture

    if family == "opt":
        return Architecture("opt", 32, 64, 2, 2, 3, vocabulary=96, context=16, tied=True)
    return Architecture(family, 32, 48, 4, 2, 3, vocabulary=96)


def test_the_models_have_the_sizes_they_are_known_for(bench):
    from arithmetic import weights
    from shapes import MODELS

    for name, sizes in MODELS.items():
        with torch.device("meta"):
            built = sum(p.numel() for p in sizes.build().parameters())
        assert sum(weights(sizes, sizes.layers)) == built
        billions = {"OPT-6.6B": 6.66, "LLaMA-3-8B": 8.03, "Mistral-7B": 7.25, "OPT-30B": 29.97}
        assert built / 1e9 == pytest.approx(
            billions.get(name, float(name.split("-")[-1].removesuffix("B"))), rel=0.025
        )


@pytest.mark.parametrize("family", ["opt", "llama", "mistral"])
def test_operations_are_those_that_torch_counts(bench, family):
    from arithmetic import inference, training

    sizes, batch, context = small(family), 2, 16
    with torch.device("meta"):
        model = sizes.build(context=context)
        ids = torch.zeros(batch, context, dtype=torch.long)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(input_ids=ids)
    with FlopCounterMode(display=False) as both:
        model(input_ids=ids, labels=ids).loss.backward()
    tokens = batch * context

    def split(operations):
        attention = sum(o.flops for o in operations if o.name == "attention")
        rest = sum(o.flops for o in operations if not o.name.startswith("attention"))
        return rest, 2 * attention  # eager attention doesn't leave out the causal half

    rest, attention = split(inference(sizes, sizes.layers, tokens, context))
    # Besides the products, rotations of positions are counted, a small product each.
    assert forward.get_total_flops() == pytest.approx(rest + attention, rel=0.01)
    rest, attention = split(training(sizes, sizes.layers, tokens, context))
    assert both.get_total_flops() == pytest.approx(rest + 3 * attention, rel=0.01)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("opt", "bf16 with fp32 moments"), pytest.param("llama", "fp32", marks=pytest.mark.full)],
)
def test_state_is_what_lies_in_memory(bench, family, kind):
    import state
    from arithmetic import training_state

    dtype, size = state.KINDS[kind]
    sizes = small(family)
    found = state.count(sizes, sizes.layers, dtype)
    want = training_state(sizes, sizes.layers, size, 4)
    assert found["dense"]["model"] == want.dense
    assert found["sparse"]["model"] == want.sparse
    assert found["sparse"]["pruned"] / found["dense"]["pruned"] == want.linears <= 0.53


def test_inference_state_is_what_lies_in_memory(bench):
    from arithmetic import inference_state

    sizes = small("llama")
    model = slope_fx.compile(sizes.build().bfloat16(), "2:4", adapter_rank=8, backend="eager")
    want = inference_state(sizes, sizes.layers, 8 / sizes.hidden)
    assert sum(p.nbytes for p in model.parameters()) == want.sparse


def test_limits(bench):
    """Where only products count, what is left is METHOD's: 2 a product, 1.5 a step."""
    from arithmetic import TWO_OF_THREE, Operation, Roofline, inference, training
    from shapes import MODELS

    endless = Roofline(1e15, 1e30)
    sizes = MODELS["OPT-66B"]
    assert TWO_OF_THREE == 1.5
    for context, tolerance in ((1, 0.04), (2048, 0.2)):
        step, forward = (f(sizes, 64, 4096, context) for f in (training, inference))
        assert 1.5 * (1 - tolerance) < endless.dense(step) / endless.sparse(step) < 1.5
        assert 2 * (1 - tolerance) < endless.dense(forward) / endless.sparse(forward) < 2
    # Where only bytes do, for one token: 9/16 of the weight.
    few = inference(sizes, 64, 1, 1, kept=True)
    narrow = Roofline(1e30, 1e12)
    assert narrow.dense(few) / narrow.sparse(few) == pytest.approx(16 / 9, rel=0.03)
    adapters = [narrow.sparse(inference(sizes, 64, 1, 1, rank)) for rank in (0, 0.0156, 0.0625)]
    assert adapters == sorted(set(adapters))
    assert adapters[0] > narrow.dense(few)  # for so few tokens an operand isn't worth making
    one = [Operation("", 8.0, 2, 100, 50)]
    assert Roofline(1, 1).dense(one) == 100
    assert Roofline(1, 100).dense(one) == 8
    assert Roofline(1, 100).sparse(one) == 4


def test_a_truncated_models_limit_is_that_of_what_is_built(bench, monkeypatch):
    """Two blocks, a small vocabulary, and no linear left dense."""
    import argparse

    import paper
    from arithmetic import Roofline, inference, training, weights
    from shapes import MODELS, Architecture

    MODELS["toy"] = Architecture("llama", 32, 48, 4, 2, 3, vocabulary=4096)
    try:
        args = argparse.Namespace(quick=True, batch=2, context=8)
        roofline = argparse.Namespace(
            device=torch.device("cpu"), flops_per_second=1e9, bytes_per_second=1e9
        )
        case = paper.Case("toy", "training", roofline, args)
        assert (case.layers, case.whole) == (2, False)
        sparse = case.sparse()
        want = Architecture("llama", 32, 48, 4, 2, 3, vocabulary=1024)
        elements = sum(w.d_out * w.d_in for w in slope_fx.sparse_weights(sparse).values())
        assert weights(want, 2, skip_first=False)[0] == elements
        assert sum(weights(want, 2, skip_first=False)) == sum(
            p.numel() for p in case.model().parameters()
        )
        for kind, operations in (
            ("training", training(want, 2, 16, 8, skip_first=False)),
            ("inference", inference(want, 2, 16, 8, skip_first=False)),
        ):
            line = Roofline(1e9, 1e9)
            assert case.entry(kind)["predicted"] == line.dense(operations) / line.sparse(operations)
    finally:
        del MODELS["toy"]


@pytest.fixture
def run(bench, monkeypatch):
    """Runs the benchmark in this process."""
    import paper

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["paper.py", *map(str, arguments)])
        paper.main()

    return run


def test_dry_run(tmp_path, run, capsys):
    from paper import PAPER
    from shapes import MODELS

    run("--dry-run", "--out", tmp_path, "--tflops", 990, "--gbps", 3350)
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "paper_dry_run.json").read_text())
    assert [e["model"] for e in result["models"]] == list(MODELS)
    assert set(PAPER) == set(MODELS)
    for entry in result["models"]:
        assert entry["model"] in text
        assert 1 < entry["training"] < 1.5
        assert 2 > entry["inference"][0] > entry["inference"][1] > entry["inference"][2] > 1
        assert entry["state"]["bf16"]["linears"] <= 0.53


def test_mistakes_are_told(tmp_path, run):
    with pytest.raises(SystemExit, match="--context 4096; allowed are 1 to 2048"):
        run("--context", 4096)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="there is no CUDA device; --dry-run needs none"):
            run("--out", tmp_path)


@pytest.mark.full
def test_it_runs_and_its_page_is_made(tmp_path, run, monkeypatch):
    """All of it, the peer too, with the stand-in for the library on the CPU."""
    import paper
    from pages import gpu as pages
    from pages import plots
    from pages.common import read

    monkeypatch.setenv("SLOPE_FX_ENGINES", "cusparselt")
    monkeypatch.setattr(racing, "_SECONDS", 0.0)
    monkeypatch.setattr(paper, "RANKS", (0.0, 0.0625))
    semi = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    monkeypatch.setattr(semi, "_validate_device_dim_dtype_shape", classmethod(lambda *_: None))
    with fake.installed(monkeypatch):
        run("--device", "cpu", "--out", tmp_path, "--seconds", 600)
    result = json.loads((tmp_path / "paper.json").read_text())
    step, *passes = result["entries"]
    assert step["kind"] == "training"
    assert [(e["rank"], e["kept"]) for e in passes] == [(0.0, False), (0.0, True), (0.0625, False)]
    operands = [sum(r["operand_bytes"] for r in e["explain"]["linears"]) for e in passes]
    assert operands[0] == operands[2] == 0 < operands[1]
    assert result["left_out"] == result["wrong"] == []
    assert passes[0]["peer"]["speedup"] > 0
    assert passes[1]["peer"] is passes[2]["peer"] is None
    for entry in result["entries"]:
        assert entry["difference"] < 0.05
        assert entry["speedup"] > 0
        reports = [r for r in entry["explain"]["linears"] if r["kind"] == "sparse"]
        assert {p["engine"] for r in reports for p in r["products"]} == {"cusparselt"}
    for entry in result["entries"]:
        entry["model"] = "OPT-2.6B"
    text = pages.paper_measured(result, json.loads(json.dumps(paper.PAPER)))
    assert text.count("| OPT-2.6B") == 4
    assert "1.13" in text  # the paper's training
    plots.paper_plot(read("paper_dry_run"), result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_what_there_is_no_time_for_is_told(tmp_path, run):
    run("--device", "cpu", "--out", tmp_path, "--seconds", 1e-9)
    result = json.loads((tmp_path / "paper.json").read_text())
    assert result["entries"] == []
    assert result["left_out"] == ["training of tiny", "inference of tiny"]
