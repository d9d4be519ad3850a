"""The commands for a frozen checkpoint: convert --freeze, generate, bench and package."""

import functools
import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import slope_fx
from models import VOCABULARY, awake, gpt2, llama
from slope_fx import cli
from slope_fx.frozen import FrozenWeight
from slope_fx.record import Frozen, record_of

PROMPT = "w1 w2 w3"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A training checkpoint with a tokenizer, and the text that its dense model writes."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    torch.manual_seed(0)
    model = awake(llama(), backend=None)
    path = slope_fx.save_pretrained(model, tmp_path_factory.mktemp("c") / "c", tokenizer=tokenizer)
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        out = slope_fx.densify(model).generate(**ids, max_new_tokens=5, do_sample=False)
    return path, tokenizer.decode(out[0], skip_special_tokens=True)


def run(capsys, *arguments):
    assert cli.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_writes_what_the_dense_model_writes(checkpoint, capsys):
    path, want = checkpoint
    got = run(capsys, "generate", path, PROMPT, "--tokens", 5)
    assert got == {"prompt": PROMPT, "text": want}


def test_sampling_follows_the_seed(checkpoint, capsys):
    def sampled(seed):
        arguments = ("--tokens", 8, "--temperature", 5.0, "--seed", seed)
        return run(capsys, "generate", checkpoint[0], PROMPT, *arguments)["text"]

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize("values", ["float", "int8"])
def test_convert_freezes_a_checkpoint(checkpoint, values, tmp_path, capsys):
    target, more = tmp_path / "frozen", ("--values", values, "--dtype", "bfloat16")
    run(capsys, "convert", checkpoint[0], target, "--freeze", *more)
    model = slope_fx.load_pretrained(target, backend=None)
    assert model.dtype is torch.bfloat16
    for weight in slope_fx.sparse_weights(model).values():
        assert isinstance(weight, FrozenWeight)
        assert weight.values.dtype is (torch.bfloat16 if values == "float" else torch.int8)
    text = run(capsys, "generate", target, PROMPT, "--tokens", 2)["text"]
    assert text.startswith(PROMPT)


def test_convert_makes_adapters_of_another_rank_for_codes(checkpoint, tmp_path, capsys):
    target, more = tmp_path / "frozen", ("--values", "int4", "--group", 64, "--adapter-rank", 2)
    run(capsys, "convert", checkpoint[0], target, "--freeze", *more)
    model = slope_fx.load_pretrained(target, backend=None)
    assert {weight.rank for weight in slope_fx.sparse_weights(model).values()} == {2}
    assert record_of(model).frozen == Frozen("int4", 64)


@pytest.mark.parametrize("given", [("--sparsity", "1:4"), ("--adapter-rank", "2")])
def test_convert_tells_what_a_frozen_checkpoint_does_not_take(checkpoint, given, tmp_path, capsys):
    """The pattern is that of the source, and floating-point values keep their adapters."""
    assert cli.main(["convert", str(checkpoint[0]), str(tmp_path / "f"), "--freeze", *given]) == 0
    name = given[0].removeprefix("--").replace("-", "_")
    assert f"{name} has no effect on the way from sparse to sparse" in capsys.readouterr().err
    weights = slope_fx.sparse_weights(slope_fx.load_pretrained(tmp_path / "f", backend=None))
    assert {(str(w.pattern), w.rank) for w in weights.values()} == {("2:4", 4)}


def test_convert_needs_a_kind(checkpoint, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", str(checkpoint[0]), "new"])
    assert stopped.value.code == cli.MISUSED
    assert "--to (or --freeze)" in capsys.readouterr().err


def test_bench_without_the_dense_model(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("slope_fx.frozen.bench.load_pretrained", functools.partial(
        slope_fx.load_pretrained, backend="eager"))  # fmt: skip
    report = run(capsys, "bench", checkpoint[0], "--length", 6, "--tokens", 4, "--no-dense")
    assert list(report) == ["frozen"]
    assert report["frozen"]["tokens_per_second"] > 0


@pytest.mark.full
@pytest.mark.inductor
def test_bench_reports_both_models(checkpoint, capsys):
    report = run(capsys, "bench", checkpoint[0], "--length", 6, "--tokens", 4)
    assert report["frozen"]["bytes"] < report["dense"]["bytes"]
    rates = [report[side]["tokens_per_second"] for side in ("frozen", "dense")]
    assert report["speedup"] == rates[0] / rates[1]


@pytest.mark.full
@pytest.mark.inductor
def test_package_writes_what_a_bare_process_loads(checkpoint, tmp_path, capsys):
    made = run(capsys, "package", checkpoint[0], tmp_path / "model.pt2")
    assert (tmp_path / "libslope_fx.so").samefile(made["library"])
    model = torch._inductor.aoti_load_package(made["path"])
    ids = torch.arange(6)[None]
    want = slope_fx.load_pretrained(checkpoint[0], backend=None)(ids).logits
    torch.testing.assert_close(model(input_ids=ids), want.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "nowhere", "a"), "source='nowhere' is not a folder"),
        (("generate", "{}", "a", "--tokens", "0"), "tokens=0"),
        (("generate", "{}", "w1 w2 w3", "--tokens", "30"), "33, and the model has 32 positions"),
        (("generate", "{}", ""), "prompt='' has no tokens"),
        (("generate", "{}", "a", "--temperature", "nan"), "temperature=nan"),
        (("generate", "{}", "a", "--temperature", "inf"), "temperature=inf"),
        (("generate", "{}", "a", "--seed", str(10**20)), f"seed={10**20}; allowed is"),
        (("bench", "{}", "--length", "32"), "length=32, tokens=32: "),
        (("bench", "{}", "--tokens", "1"), "tokens=1; allowed is a whole number from 2"),
        (("convert", "{}", "new", "--to", "dense", "--freeze"), "freeze was given with to='dense'"),
        (("convert", "{}", "new", "--to", "dense", "--dtype", "bfloat16"), "without freeze"),
        (("convert", "{}", "new", "--to", "dense", "--group", "32"), "group was given without"),
        (("convert", "{}", "new", "--freeze", "--group", "32"), 'with values="float"'),
        (("package", "{}", "model.so"), "pt2"),
    ],
)
def test_mistakes_are_told(checkpoint, arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main([a.format(checkpoint[0]) for a in arguments]) == cli.FAILED
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_a_tokenizer(tmp_path, capsys):
    """transformers makes a gpt2 an empty one from its configuration."""
    path = slope_fx.save_pretrained(awake(gpt2(), backend=None), tmp_path / "c")
    assert cli.main(["generate", str(path), "w1"]) == cli.FAILED
    assert "has no tokenizer. Save it with the model" in capsys.readouterr().err


def test_a_tokenizer_goes_with_a_converted_model(tmp_path, capsys):
    """A tokenizer of other files than tokenizer.json is copied. A damaged one is an error."""
    source = tmp_path / "source"
    gpt2().save_pretrained(source)
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<|endoftext|>": VOCABULARY - 1}
    (source / "vocab.json").write_text(json.dumps(words))
    (source / "merges.txt").write_text("#version: 0.2\n")
    run(capsys, "convert", source, tmp_path / "sparse", "--to", "sparse")
    assert AutoTokenizer.from_pretrained(tmp_path / "sparse").get_vocab() == words
    (source / "tokenizer.json").write_text("{")
    arguments = ["convert", str(source), str(tmp_path / "again"), "--to", "sparse"]
    assert cli.main(arguments) == cli.FAILED
    assert "its tokenizer can't be read" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
