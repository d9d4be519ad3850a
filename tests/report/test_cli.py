"""The command line, in this process: what it prints, writes and returns."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig

import models
import slope_fx
from models import logits
from slope_fx import cli
from slope_fx.report.explain import Explanation


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense model of transformers on disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli") / "dense"
    models.llama().save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys):
    def call(*arguments, code=0):
        assert cli.main([str(a) for a in arguments]) == code
        return capsys.readouterr()

    return call


def test_explain_tells_what_compile_would_do(dense, run):
    """From the configuration alone the same table as of the compiled model, sizes and all."""
    model = models.LlamaForCausalLM.from_pretrained(dense)
    slope_fx.compile(model, {"*.mlp.*": "2:8", "*": "2:4"}, adapter_rank=3, backend=None)
    want = slope_fx.explain(model)
    told = run(
        "explain", dense / "config.json", "--sparsity", "*.mlp.*=2:8", "*=2:4", "--adapter-rank",
        "3", "--no-measure", "--json",
    )  # fmt: skip
    got = Explanation.from_dict(json.loads(told.out))
    met = [dataclasses.replace(linear, products=()) for linear in want.linears]
    assert list(got.linears) == met
    assert slope_fx.preview(dense, "2:4", measure=False).linears


def test_explain_says_what_gains_here(dense, run):
    text = run("explain", dense, "--tokens", 16).out
    assert "of 11 sparse linears train faster than dense here" in text
    assert "cpu" in text


def test_explain_says_what_gains_here_of_a_checkpoint(dense, tmp_path, run):
    run("convert", dense, tmp_path / "sparse", "--to", "sparse")
    text = run("explain", tmp_path / "sparse", "--tokens", 1).out
    assert "(not run yet)" not in text
    assert "of 11 sparse linears train faster than dense here, by all three products at 1" in text
    assert "(not run yet)" in run("explain", tmp_path / "sparse", "--no-measure").out


def test_explain_describes_a_frozen_checkpoint(dense, tmp_path, run):
    """With the bytes and the routes of the model in it."""
    run("convert", dense, tmp_path / "sparse", "--to", "sparse")
    more = ("--values", "int8", "--adapter-rank", "4")
    run("convert", tmp_path / "sparse", tmp_path / "frozen", "--freeze", *more)
    told = json.loads(run("explain", tmp_path / "frozen", "--json").out)
    model = slope_fx.load_pretrained(tmp_path / "frozen", backend=None)
    assert told == json.loads(json.dumps(slope_fx.explain(model).to_dict()))
    error = run("explain", tmp_path / "frozen", "--world-size", "2", code=cli.FAILED).err
    assert "is a frozen model, which is not sharded" in error


def test_explain_describes_a_checkpoint_in_which_nothing_is_pruned(tmp_path, run):
    model = slope_fx.compile(models.llama(), method="dense", backend=None)
    slope_fx.save_pretrained(model, tmp_path / "c")
    assert 'A checkpoint of method="dense".' in run("explain", tmp_path / "c").out


def test_explain_describes_70_billion_parameters(tmp_path, run):
    """On the meta device: its weights would take 140 GB."""
    LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=4, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(tmp_path)  # fmt: skip
    told = json.loads(run("explain", tmp_path, "--no-measure", "--json").out)
    sizes = {tuple(linear["shape"]) for linear in told["linears"] if linear["kind"] == "sparse"}
    assert sizes == {(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)}
    ratio = sum(r["state_after"] for r in told["linears"] if r["kind"] == "sparse") / sum(
        r["state_before"] for r in told["linears"] if r["kind"] == "sparse"
    )
    assert ratio == pytest.approx(0.5156, abs=1e-4)  # METHOD: 0.516, bf16 with fp32 moments


def test_there_and_back(dense, tmp_path, run, monkeypatch):
    """Dense to sparse, to PEFT, to sparse again, to dense: the same logits all along."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense, "dense")
    told = run("convert", "dense", "sparse", "--to", "sparse", "--adapter-rank", 4,
               "--adapter-init", "svd")  # fmt: skip
    assert told.out == "sparse: sparse\n"
    want = logits(slope_fx.load_pretrained("sparse", backend="eager"))
    run("inspect", "sparse")
    assert "adapters take part in 11" in run("explain", "sparse").out
    assert "sparsity has no effect" in run("explain", "sparse", "--sparsity", "1:4").err
    told = json.loads(run("convert", "sparse", "adapter", "--to", "peft", "--json").out)
    assert told == {"peft": "adapter", "dense": "adapter-base"}
    run("convert", "adapter", "again", "--to", "sparse")
    got = logits(slope_fx.load_pretrained("again", backend="eager"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for source, target in (("sparse", "merged"), ("adapter", "merged-too")):
        run("convert", source, target, "--to", "dense")
        got = logits(models.LlamaForCausalLM.from_pretrained(target))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    run("convert", "again", "pruned", "--to", "dense", "--adapters", "drop")
    weight = models.LlamaForCausalLM.from_pretrained("pruned").model.layers[0].mlp.up_proj.weight
    assert (weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True},
                                  {"trainable_token_indices": [1, 2]},
                                  {"target_modules": ["o_proj", "embed_tokens"]}])  # fmt: skip
def test_what_an_adapter_of_peft_has_besides_is_not_dropped(more, dense, tmp_path, run):
    from peft import LoraConfig, get_peft_model

    model = models.LlamaForCausalLM.from_pretrained(dense)
    config = LoraConfig(r=2, **{"target_modules": ["o_proj"], **more})
    config.base_model_name_or_path = str(dense)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    told = run("convert", tmp_path / "adapter", tmp_path / "new", "--to", "sparse", code=1)
    assert "no place for" in told.err
    assert not (tmp_path / "new").exists()


def test_an_adapter_on_some_layers_leaves_the_others_able_to_learn(dense, tmp_path, run):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["o_proj"], use_rslora=True, lora_alpha=3)
    peft_model = get_peft_model(models.LlamaForCausalLM.from_pretrained(dense), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    peft_model.peft_config["default"].base_model_name_or_path = str(dense)
    peft_model.save_pretrained(tmp_path / "adapter")
    run("convert", tmp_path / "adapter", tmp_path / "new", "--to", "sparse", "--sparsity", "2:4")
    model = slope_fx.load_pretrained(tmp_path / "new", backend="eager", on_fallback="error")
    for name, weight in slope_fx.sparse_weights(model).items():
        assert weight.adapter_active
        assert bool(weight.lora_B.any()) == name.endswith("o_proj")
        assert weight.lora_A.any()
    pruned = slope_fx.densify(model, "drop").state_dict()
    peft_model.base_model.model.load_state_dict(
        {n.replace("o_proj.weight", "o_proj.base_layer.weight"): v for n, v in pruned.items()},
        strict=False,
    )
    torch.testing.assert_close(logits(model), logits(peft_model), rtol=1e-4, atol=1e-5)


def test_a_folder_that_lacks_weights_is_not_converted(dense, tmp_path, run):
    shutil.copytree(dense, tmp_path / "part")
    config = json.loads((dense / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config["layer_types"] = None
    (tmp_path / "part" / "config.json").write_text(json.dumps(config))
    told = run("convert", tmp_path / "part", tmp_path / "new", "--to", "sparse", code=1)
    assert "lacks model.layers.2" in told.err


def test_inspect_finds_what_is_wrong(dense, tmp_path, run):
    model = slope_fx.compile(models.LlamaForCausalLM.from_pretrained(dense), "2:4", backend=None)
    path = slope_fx.save_pretrained(model, tmp_path / "c")
    assert "whole, 3 files" in run("inspect", path).out
    report = json.loads(run("inspect", path, "--json").out)
    assert report["patterns"] == {"2:4": 11}
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert "SHA-256" in run("inspect", path, code=1).err
    told = json.loads(run("inspect", path, "--json", code=1).out)
    assert told["error"] == "CheckpointError"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["explain", "nowhere.json"], 1, "does not exist"),
        (["explain", "{dense}", "--sparsity", "5:4"], 1, "allowed is"),
        (["explain", "{dense}", "--dtype", "int4", "--no-measure"], 1, "dtype='int4'"),
        (["explain", "{dense}", "--tokens", "0"], 1, "tokens=0"),
        (["inspect", "{dense}"], 1, "no slope_fx.json"),
        (["convert", "{dense}", "{dense}", "--to", "sparse"], 1, "not an empty folder"),
        (["convert", "{dense}", "{new}", "--to", "dense"], 1, "is dense already"),
        (["convert", "{dense}", "{new}", "--to", "peft"], 1, "no adapters for PEFT"),
        (["convert", "{dense}", "{new}", "--to", "sparse", "--adapter-init", "svd"], 1, "rank"),
        (["convert", "{dense}", "{new}"], 2, "--to"),
        (["shrink"], 2, "invalid choice"),
        ([], 2, "COMMAND"),
    ],
)
def test_mistakes(arguments, code, words, dense, tmp_path, capsys):
    filled = [a.format(dense=dense, new=tmp_path / "new") for a in arguments]
    try:
        got = cli.main(filled)
    except SystemExit as error:
        got = error.code
    assert got == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_help_has_an_example_of_each_command():
    """As installed; and as a module."""
    for command in ("explain", "convert", "inspect", "generate", "bench", "package"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
    done = subprocess.run(
        [sys.executable, "-m", "slope_fx", "convert", "--help"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "slope-fx convert my-model my-model-2-4 --to sparse" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("explain", "sparse", "--sparsity", "2:4"), "sparsity has no effect"),
        (("explain", "sparse", "--no-measure", "--tokens", "1024"), "tokens has no effect"),
        (("explain", "dense", "--no-measure", "--tokens", "1024"), "tokens has no effect"),
        (("explain", "frozen", "--tokens", "1024"), "tokens has no effect"),
        (("explain", "frozen", "--no-measure"), "measure=False has no effect"),
        (
            ("convert", "sparse", "a", "--to", "dense", "--sparsity", "2:4"),
            "sparsity has no effect",
        ),
        (
            ("convert", "dense", "b", "--to", "sparse", "--adapters", "merge"),
            "adapters has no effect",
        ),
        (
            ("convert", "sparse", "c", "--to", "dense", "--adapter-init", "zero"),
            "adapter_init has no effect",
        ),
    ],
    ids=" ".join,
)
def test_an_option_without_effect_is_told_though_it_has_the_default_value(
    arguments, words, of_each_kind, run, monkeypatch, tmp_path
):
    for folder in of_each_kind.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert words in run(*arguments).err


@pytest.fixture(scope="module")
def of_each_kind(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    shutil.copytree(dense, folder / "dense")
    for source, target, more in (("dense", "sparse", ["--to", "sparse"]),
                                 ("sparse", "frozen", ["--freeze"])):  # fmt: skip
        assert cli.main(["convert", str(folder / source), str(folder / target), *more]) == 0
    return folder


def test_two_patterns_for_all_layers_are_refused(dense, run):
    told = run("explain", dense, "--no-measure", "--sparsity", "2:4", "2:8", code=cli.FAILED).err
    assert "--sparsity 2:4 2:8: two patterns for '*'" in told


def test_explain_of_a_model_in_which_nothing_can_be_sparse_says_why(tmp_path, run):
    LlamaConfig(
        hidden_size=30, intermediate_size=30, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, vocab_size=30, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    told = run("explain", tmp_path, "--no-measure", code=cli.FAILED).err
    assert "model.layers.0.mlp.up_proj: " in told
