"""A transformers model that is split by its own plan trains as in one process."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import models
import slope_fx
from parallel import adamw, assert_same, schedule_of, whole_state
from slope_fx.checkpoints import load_dense
from slope_fx.errors import ArgumentError, ArgumentWarning, UnsupportedError
from slope_fx.integrations.tensor_parallel import parallelize
from slope_fx.sparse.shards import whole

STEPS = 8


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def train(model):
    optimizer, schedule, losses = adamw(model), schedule_of(model, STEPS), []
    for step in range(STEPS):
        loss = models.loss_of(model, models.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(whole(loss.detach()).item())
    return {"losses": losses, "state": whole_state(model)}


def compiled(model, backend="aot_eager"):
    torch.manual_seed(0)
    return slope_fx.compile(model, adapter_rank=4, backend=backend, on_fallback="error")


def awake(model):
    """Adapters that matter as soon as they are active."""
    generator = torch.Generator().manual_seed(7)
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_B.data.normal_(generator=generator).mul_(0.1)
    return model


def as_one(path, backend):
    """Loaded from local files, as with tp_plan="auto", all layers of the plan are split."""
    model = awake(compiled(AutoModelForCausalLM.from_pretrained(path), backend))
    want = train(copy.deepcopy(model))
    parallelize(model, mesh())
    assert_same(train(model), want)
    split = {n for n, p in model.named_parameters() if isinstance(p, DTensor)}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= split
    assert "model.layers.0.self_attn.q_proj.weight" in split  # dense: skip_first
    down = slope_fx.sparse_weights(model)["model.layers.1.mlp.down_proj"]
    assert down.values.placements == down.backward_bits.placements == (Shard(1),)
    assert down.adapter_active


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_as_one_process(ranks, tmp_path, backend):
    models.llama().save_pretrained(tmp_path)
    ranks.run(2, as_one, str(tmp_path), backend)


def by_parts(path):
    """No rank holds the model: made on the meta device, split, then each reads its part."""
    want = compiled(AutoModelForCausalLM.from_pretrained(path))
    with torch.device("meta"):
        model = models.llama()
    parallelize(compiled(model), mesh())
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    load_dense(path, model)
    got, expected = whole_state(model), want.state_dict()
    for name, tensor in expected.items():
        assert "lora_A" in name or torch.equal(got[name], tensor), name
    ids = models.batch()
    difference = whole(models.loss_of(model, ids)) - models.loss_of(want, ids)
    assert abs(difference.item()) < 1e-5


def test_each_rank_reads_its_part(ranks, tmp_path):
    models.llama().save_pretrained(tmp_path)
    ranks.run(2, by_parts, str(tmp_path))


def tied():
    model = models.llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model = awake(compiled(model))
    want = train(copy.deepcopy(model))
    with pytest.warns(ArgumentWarning, match=r"lm_head shares its weight"):
        parallelize(model, mesh())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(train(model), want)


@pytest.mark.full
def test_shared_weights_stay_whole(ranks):
    ranks.run(2, tied)


def refused():
    model = compiled(models.llama())
    with pytest.raises(ArgumentError, match=r"plan\['model.nothing'\] names no module"):
        parallelize(model, mesh(), {**model.tp_plan, "model.nothing": "colwise"})
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.up_proj: .*'packed_colwise'"):
        parallelize(
            model, mesh(), {**model.tp_plan, "model.layers.*.mlp.up_proj": "packed_colwise"}
        )
    with pytest.raises(ArgumentError, match="GPT2LMHeadModel has no tp_plan"):
        parallelize(compiled(models.gpt2()), mesh())
    qwen = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, vocab_size=64,
        )
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"q_norm: .*'replicated_with_grad_allreduce'"):
        parallelize(compiled(qwen), mesh())
    llama = models.llama()
    llama.model.layers[1].mlp.down_proj = torch.nn.Linear(24, 32, bias=False)
    llama.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 24, bias=False)
    llama.model.layers[1].mlp.gate_proj = torch.nn.Linear(32, 24, bias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(llama)
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.down_proj .*into 2 parts"):
        parallelize(llama, mesh())
    for whole_model in (model, qwen, llama):
        assert not any(isinstance(p, DTensor) for p in whole_model.parameters())


def test_refused(ranks):
    ranks.run(2, refused)
