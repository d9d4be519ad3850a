"""The commands for a frozen checkpoint: convert --freeze, generate, bench and package."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import slope_fx
from models import VOCABULARY, awake, llama
from slope_fx import cli
from slope_fx.frozen import FrozenWeight

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
    run(capsys, "convert", checkpoint[0], target, "--to", "sparse", "--freeze", *more)
    model = slope_fx.load_pretrained(target, backend=None)
    assert model.dtype is torch.bfloat16
    for weight in slope_fx.sparse_weights(model).values():
        assert isinstance(weight, FrozenWeight)
        assert weight.values.dtype is (torch.bfloat16 if values == "float" else torch.int8)
    text = run(capsys, "generate", target, PROMPT, "--tokens", 2)["text"]
    assert text.startswith(PROMPT)


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
        (("bench", "{}", "--tokens", "1"), "tokens=1; allowed is a whole number from 2"),
        (("convert", "{}", "new", "--to", "dense", "--freeze"), "freeze was given with to='dense'"),
        (("convert", "{}", "new", "--to", "dense", "--dtype", "bfloat16"), "without freeze"),
        (("package", "{}", "model.so"), "pt2"),
    ],
)
def test_mistakes_are_told(checkpoint, arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main([a.format(checkpoint[0]) for a in arguments]) == cli.FAILED
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
