"""transformers opens checkpoints of slope_fx after ``import slope_fx``, and says so without it."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import models
import slope_fx
from models import batch, gpt2, llama
from slope_fx.checkpoints import read_manifest
from slope_fx.errors import ArgumentError, CheckpointError, UnsupportedError
from slope_fx.frozen import FrozenWeight
from slope_fx.integrations.quantizer import SlopeFxConfig
from slope_fx.sparse.mask import Mask
from slope_fx.sparse.weight import SparseWeight

MAKE = {"gpt2": gpt2, "llama": llama}  # gpt2: tied embeddings, Conv1D


def awake(make) -> nn.Module:
    return models.awake(make(), scale=0.5, backend=None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of checkpoints by model, kind and number of files; and the dense logits."""
    torch.manual_seed(0)
    folder, logits = tmp_path_factory.mktemp("opened"), {}
    for name, make in MAKE.items():
        model = awake(make)
        with torch.no_grad():
            logits[name] = slope_fx.densify(model)(batch()).logits.double()
        for kind in ("training", "frozen"):
            if kind == "frozen":
                slope_fx.freeze(model)
            slope_fx.save_pretrained(model, folder / f"{name}-{kind}-one")
            slope_fx.save_pretrained(model, folder / f"{name}-{kind}-many", max_shard_size="20KB")
    return folder, logits


def logits_of(model: nn.Module) -> torch.Tensor:
    """The logits, in eager execution."""
    calls = {module: module._compiled_call_impl for module in model.modules()}
    for module in calls:
        module._compiled_call_impl = None
    with torch.no_grad():
        result = model(batch()).logits.double()
    for module, call in calls.items():
        module._compiled_call_impl = call
    return result


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def same(one: nn.Module, other: nn.Module) -> None:
    """Check that two models have the same tensors, classes of parameters and gradients."""
    a, b = one.state_dict(keep_vars=True), other.state_dict(keep_vars=True)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.dtype, type(tensor)) == (b[name].dtype, type(b[name])), name
        assert tensor.requires_grad == b[name].requires_grad, name
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("files", ["one", "many"])
@pytest.mark.parametrize("kind", ["training", "frozen"])
@pytest.mark.parametrize("name", MAKE)
def test_it_is_the_model_of_load_pretrained(name, kind, files, dtype, saved):
    folder, logits = saved
    path = folder / f"{name}-{kind}-{files}"
    more = {} if dtype is None else {"dtype": dtype}
    opened, told = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **more)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded = slope_fx.load_pretrained(path, dtype=dtype)
    same(opened, loaded)
    assert not opened.training
    assert gap(logits_of(opened), logits[name]) < (1e-5 if dtype is None else 0.05)
    kinds = {type(weight) for weight in slope_fx.sparse_weights(opened).values()}
    assert kinds == {SparseWeight if kind == "training" else FrozenWeight}
    records = [slope_fx.record.record_of(model) for model in (opened, loaded)]
    assert records[0] == records[1]
    for attribute in ("hf_quantizer", "quantization_method"):
        assert not hasattr(opened, attribute)
    assert not getattr(opened.config, "quantization_config", None)
    embeddings = opened.get_input_embeddings().weight, opened.get_output_embeddings().weight
    assert (embeddings[0] is embeddings[1]) == opened.config.tie_word_embeddings


def test_quantised_values(tmp_path):
    model = slope_fx.freeze(awake(llama), values="int8")
    slope_fx.save_pretrained(model, tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    same(opened, model)
    assert gap(logits_of(opened), logits_of(model)) < 1e-6


@pytest.mark.full
@pytest.mark.inductor
@pytest.mark.parametrize("kind", [pytest.param("training", marks=pytest.mark.full), "frozen"])
def test_a_pipeline_writes_what_the_dense_model_writes(kind, saved):
    folder, _ = saved
    path = folder / f"llama-{kind}-many"
    write = transformers.pipeline("text-generation", model=str(path), tokenizer=Words())
    dense = slope_fx.densify(slope_fx.load_pretrained(path, backend=None))
    options = {"max_new_tokens": 5, "do_sample": False}
    text = "w2 w3 w5 w7"
    ids = Words()(text, return_tensors="pt").input_ids
    assert ids.tolist() == [[2, 3, 5, 7]]
    (got,) = write(text, return_tensors=True, **options)
    assert got["generated_token_ids"] == dense.generate(ids, **options)[0].tolist()


def Words():  # noqa: N802
    """A tokenizer with the vocabulary of the small models."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", eos_token="w1", pad_token="w1",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["training", "frozen"])
@pytest.mark.parametrize("name", MAKE)
def test_a_part_of_the_model(name, kind, saved):
    folder, _ = saved
    path = folder / f"{name}-{kind}-one"
    whole = slope_fx.load_pretrained(path, backend=None)
    with torch.no_grad():
        want = whole(batch(), output_hidden_states=True).hidden_states[-1]
        opened = AutoModel.from_pretrained(path)
        for module in opened.modules():
            module._compiled_call_impl = None
        assert gap(opened(batch()).last_hidden_state.double(), want.double()) < 1e-6
    prefix = f"{whole.base_model_prefix}."
    own = slope_fx.sparse_weights(opened)
    assert set(own) == {n.removeprefix(prefix) for n in slope_fx.sparse_weights(whole)}
    head = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    assert set(slope_fx.sparse_weights(head)) == set(slope_fx.sparse_weights(whole))
    assert head.score.weight.abs().sum() > 0  # made by transformers


@pytest.mark.parametrize("kind", ["training", "frozen"])
def test_save_pretrained_writes_the_format_again(kind, saved, tmp_path):
    folder, _ = saved
    opened = AutoModelForCausalLM.from_pretrained(folder / f"gpt2-{kind}-many")
    opened.save_pretrained(tmp_path / "a", max_shard_size="30KB")
    assert (read_manifest(tmp_path / "a").inference is None) == (kind == "training")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    same(slope_fx.load_pretrained(tmp_path / "a"), opened)
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "a"), opened)
    # So does a model that was compiled here, and a copy of it.
    copied = copy.deepcopy(awake(llama))
    copied.save_pretrained(tmp_path / "b")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), copied)
    for option in ({"push_to_hub": True}, {"variant": "fp8"}):
        with pytest.raises(UnsupportedError, match=r"slope_fx\.save_pretrained"):
            copied.save_pretrained(tmp_path / "c", **option)
    assert not (tmp_path / "c").exists()


def test_a_dense_model_of_it_is_an_ordinary_one(saved, tmp_path):
    folder, logits = saved
    opened = AutoModelForCausalLM.from_pretrained(folder / "gpt2-frozen-one")
    slope_fx.densify(opened).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "transformers_weights"} & told.keys()
    assert gap(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits["gpt2"]) < 1e-5


def test_it_trains(saved):
    folder, _ = saved
    opened = AutoModelForCausalLM.from_pretrained(folder / "llama-training-one")
    for module in opened.modules():
        module._compiled_call_impl = None
    optimizer = torch.optim.AdamW(opened.train().parameters(), lr=1e-2)
    schedule = slope_fx.Schedule(opened, 6, 0.0)
    losses = []
    for _ in range(6):
        loss = opened(batch(), labels=batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    for weight in slope_fx.sparse_weights(opened).values():
        assert type(weight.forward_bits) is Mask
        assert not weight.masks_problem()


def test_device_maps(saved):
    folder, logits = saved
    path = folder / "llama-frozen-many"
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        opened = AutoModelForCausalLM.from_pretrained(path, device_map=device_map)
        assert gap(logits_of(opened), logits["llama"]) < 1e-5
    with pytest.raises(UnsupportedError, match="can't stay on the disk"):
        AutoModelForCausalLM.from_pretrained(
            path, device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=folder / "offload"
        )


def test_what_it_is_not_for(saved, tmp_path):
    folder, _ = saved
    dense = slope_fx.densify(slope_fx.load_pretrained(folder / "gpt2-training-one", backend=None))
    dense.save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"slope_fx\.compile"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SlopeFxConfig())


def _flip(path):
    file = sorted(path.glob("model*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


def _widen(path):
    config = path / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "intermediate_size": 128}))


def _remove(pattern):
    return lambda path: sorted(path.glob(pattern))[0].unlink()


DAMAGE = {
    "a bit is flipped": (_flip, CheckpointError, "SHA-256"),
    "no manifest": (_remove("slope_fx.json"), CheckpointError, r"slope_fx\.json"),
    "no index": (_remove("model*.json"), OSError, r"no file named model\.safetensors"),
    "a shard is missing": (_remove("model-*.safetensors"), FileNotFoundError, "model-00001"),
    "another shape": (_widen, CheckpointError, "shape"),
}


@pytest.mark.parametrize("kind", ["training", "frozen"])
@pytest.mark.parametrize("what", DAMAGE)
def test_damage(what, kind, tmp_path):
    model = awake(llama)
    if kind == "frozen":
        slope_fx.freeze(model)
    slope_fx.save_pretrained(model, tmp_path, max_shard_size="20KB")
    damage, error, words = DAMAGE[what]
    damage(tmp_path)
    with pytest.raises(error, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_checkpoint_that_a_trainer_writes(tmp_path):
    from transformers import Trainer, TrainingArguments

    from slope_fx.integrations.transformers import SlopeCallback

    model = slope_fx.compile(llama(), adapter_rank=4, backend=None)
    data = [{"input_ids": row, "labels": row} for row in batch()]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[SlopeCallback(0.5)]).train()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    want = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in want.items())
    assert all(w.adapter_active for w in slope_fx.sparse_weights(opened).values())


BEFORE = "import slope_fx\nimport transformers\n"
ORDERS = {
    "slope_fx first": BEFORE,
    "transformers first": "import transformers\nimport slope_fx\n",
    "its quantizers first": "import transformers.quantizers.auto\nimport slope_fx\n",
    "a look before": "import slope_fx, importlib.util\nimport transformers\n"
    "assert importlib.util.find_spec('transformers.quantizers.auto')\n",
    "reloaded": BEFORE + "import importlib, transformers.quantizers.auto as a\n"
    "importlib.reload(slope_fx)\n",
}
OPEN = """
import sys, torch
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(next(iter(slope_fx.sparse_weights(model).values()))).__name__)
"""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    here = os.path.dirname(os.path.dirname(slope_fx.__file__))
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": here}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "order",
    [
        order if order == "slope_fx first" else pytest.param(order, marks=pytest.mark.full)
        for order in ORDERS
    ],
)
def test_orders_of_import(order, saved):
    done = run(ORDERS[order] + OPEN, saved[0] / "llama-frozen-many")
    assert done.stdout.split() == ["FrozenWeight"], done.stderr


def test_slope_fx_does_not_import_what_takes_seconds():
    """torch itself does not, either."""
    slow = "transformers", "torch._dynamo", "torch._inductor"
    done = run(f"import sys, slope_fx; print(*[name for name in {slow} if name in sys.modules])")
    assert done.stdout.split() == [], done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_without_the_import_transformers_says_what_is_missing(saved):
    program = "import sys, transformers as t\nt.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    for name in ("llama-frozen-many", "llama-training-one"):
        done = run(program, saved[0] / name)
        assert done.returncode == 1
        assert "Unknown quantization type, got slope_fx" in done.stderr
        assert done.stderr.strip().splitlines()[-1].endswith("import_slope_fx_first.safetensors")


def test_it_is_registered_once():
    assert AUTO_QUANTIZER_MAPPING["slope_fx"].__name__ == "SlopeFxQuantizer"
    assert not any(type(finder).__name__ == "_AfterImport" for finder in sys.meta_path)
