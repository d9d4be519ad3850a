"""A model that no rank ever holds whole: built on the meta device, sharded and initialised."""

import math

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import slope_fx
from models import VOCABULARY
from peak import Peak
from slope_fx.checkpoints import load_dense

LAYERS = 8


def built():
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=128,
                num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
                max_position_embeddings=32,
            )
        )  # fmt: skip


def compiled():
    return slope_fx.compile(built(), backend=None, adapter_rank=4)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_bytes(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def one_process():
    model = compiled().to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    return model


def shard_then_initialise(model, path):
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cpu")
    model.init_weights()


def initialise_then_shard(model, path):
    torch.manual_seed(3)
    inner = model.model
    for part in (inner.embed_tokens, *inner.layers, inner.norm, inner.rotary_emb, model.lm_head):
        part.to_empty(device="cpu")
        part.apply(model._init_weights)
        fully_shard(part)
    fully_shard(model)


def shard_then_load(model, path):
    fully_shard(model)
    model.to_empty(device="cpu")
    load_dense(path, model)


def build(way, path):
    with Peak() as counted:
        model = compiled()
        globals()[way](model, path)
    shard = local_bytes(model)
    state = {name: whole(tensor).numpy() for name, tensor in model.state_dict().items()}
    return state, counted.peak, shard


@pytest.mark.full
@pytest.mark.parametrize(
    "way",
    [
        shard_then_initialise,
        pytest.param(initialise_then_shard, marks=pytest.mark.full),
        pytest.param(shard_then_load, marks=pytest.mark.full),
    ],
)
def test_building(ranks, way, tmp_path):
    """A rank holds its shard and one dense block at most. Sharding last changes no number."""
    expected = one_process()
    if way is shard_then_load:
        path = tmp_path / "dense"
        dense = built().to_empty(device="cpu")
        torch.manual_seed(3)
        dense.init_weights()
        dense.save_pretrained(path)
    blocks = built().model.layers[0].parameters()
    block = sum(math.prod(p.shape) * p.element_size() for p in blocks)
    for state, peak, shard in ranks.run(2, build, way.__name__, tmp_path / "dense"):
        assert shard < 1.1 * local_bytes(expected) / 2
        assert shard <= peak < shard + block
        if way is shard_then_initialise:
            continue  # torch draws the shards of dense parameters on each rank by itself
        for name, tensor in expected.state_dict().items():
            if way is initialise_then_shard or "lora_A" not in name:  # drawn with another seed
                assert torch.equal(torch.from_numpy(state[name]), tensor), name
