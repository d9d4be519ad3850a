"""``explain --world-size``: what a rank holds and receives, held to what ``fully_shard`` does."""

import dataclasses
import json
import resource
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

import models
import slope_fx
from parallel import batch, compiled, schedule_of
from sent import counting
from slope_fx.errors import ArgumentError
from slope_fx.report import Explanation

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
COMMAND = [sys.executable, "-m", "slope_fx", "explain", "--no-measure", "--json"]


def config(folder, **more):
    (folder / "config.json").write_text(json.dumps({**LLAMA_70B, **more}))
    return folder


def small(folder):
    models.llama().config.save_pretrained(folder)
    return folder


@pytest.fixture
def fake():
    """Makes a process group whose other ranks don't exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def make(rank, world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def held(folder, adapter_rank):
    """Bytes of the shards of the compiled model on this rank, and of those that train."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shard(slope_fx.compile(model, adapter_rank=adapter_rank, backend=None))
    found = dict.fromkeys(("values", "masks", "adapters", "others"), 0)
    for name, parameter in model.named_parameters():
        kind = "values" if name.endswith("_values") else "others"
        kind = "masks" if name.endswith("_bits") else kind
        kind = "adapters" if ".lora_" in name else kind
        found[kind] += parameter.to_local().nbytes
    return found


def kept(side):
    return {name: getattr(side, name) for name in ("values", "masks", "adapters", "others")}


@pytest.mark.parametrize("world", [1, 3, 64])
def test_the_shards_are_those_of_fully_shard(fake, tmp_path, world):
    """Rows that divide by the ranks and rows that don't, on a fake world; rank 0 has the most."""
    folder = small(tmp_path)
    told = slope_fx.preview(folder, adapter_rank=3, measure=False, world_size=world).sharding
    for rank in sorted({0, world - 1}):
        fake(rank, world)
        found = held(folder, 3)
        dist.destroy_process_group()
        if not rank:
            assert found == kept(told.sparse) == kept(told.adapter)
        else:
            assert all(found[kind] <= size for kind, size in kept(told.sparse).items())


@pytest.mark.parametrize(
    "layers", [2, pytest.param(80, marks=pytest.mark.full)], ids=["two blocks", "the whole"]
)
def test_70_billion_parameters_on_64_ranks(fake, tmp_path, layers):
    folder = config(tmp_path, num_hidden_layers=layers)
    fake(0, 64)
    found = held(folder, 128)
    dist.destroy_process_group()
    start = time.perf_counter()
    done = subprocess.run(
        [*COMMAND, "--world-size", "64", "--adapter-rank", "128", folder],
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert time.perf_counter() - start < 240  # 20 s for the whole model on a machine at rest
    told = Explanation.from_dict(json.loads(done.stdout)).sharding
    assert kept(told.sparse) == found
    assert told.split_layers == 0  # 1024 rows of keys and values on 64 ranks: four groups of M
    assert told.blocks == layers
    if layers == 80:
        assert told.sparse.gradients / told.dense.gradients == pytest.approx(0.515, abs=1e-3)
        assert told.sparse.all_gather / told.dense.all_gather == pytest.approx(0.600, abs=1e-3)
    # The weights of two blocks would take 7 GiB, those of the whole 130 GiB.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20  # KiB


def received(adapter_start):
    """Bytes that this rank receives in a step, in all-gathers and reduce-scatters, and a refresh.

    In an all-gather and a reduce-scatter, that is (ranks - 1) times the size of its shards.
    """
    model = compiled("llama", "eager", adapter_rank=3)
    shard(model)
    schedule = schedule_of(model, adapter_start=adapter_start, backward_mask_interval=1)
    with counting() as step:
        models.loss_of(model, batch(0, 0)).backward()
    got, exchange = [], dist.all_to_all_single

    def noted(output, *args, **kwargs):
        got.append(output.nbytes)
        return exchange(output, *args, **kwargs)

    dist.all_to_all_single = noted
    try:
        schedule.step()
    finally:
        dist.all_to_all_single = exchange
    others = dist.get_world_size() - 1
    scattered = step["reduce_scatter"] // dist.get_world_size()
    return step["all_gather"] * others, scattered * others, sum(got)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.full)])
def test_a_step_receives_what_was_told(ranks, tmp_path, world):
    """Counted on real ranks, in both phases. Three ranks split groups of M rows, two don't."""
    told = slope_fx.preview(small(tmp_path), adapter_rank=3, measure=False, world_size=world)
    assert (told.sharding.split_layers > 0) == (world == 3)
    for start, want in ((1.0, told.sharding.sparse), (0.0, told.sharding.adapter)):
        found = ranks.run(world, received, start)
        assert {(gather, scatter) for gather, scatter, _ in found} == {
            (want.all_gather, want.reduce_scatter)
        }
        assert max(refresh for _, _, refresh in found) == want.refresh


def test_the_table(tmp_path):
    folder = small(tmp_path)
    told = slope_fx.preview(folder, adapter_rank=3, measure=False, world_size=3)
    again = Explanation.from_dict(json.loads(json.dumps(told.to_dict())))
    assert again == told
    text = str(told)
    assert "Sharded over 3 ranks by FSDP2 (fully_shard on each of 2 blocks and on the mod" in text
    assert "send rows at the edges of shards, in" in text
    local = str(slope_fx.preview(folder, measure=False, world_size=2))
    assert "Refreshes of the masks are local" in local
    assert "adapters active" in text
    assert "adapters active" not in local
    one = dataclasses.asdict(slope_fx.preview(folder, measure=False, world_size=1).sharding.sparse)
    assert {one[name] for name in ("all_gather", "reduce_scatter", "refresh")} == {0}
    assert slope_fx.preview(folder, measure=False).sharding is None


def test_a_checkpoint(tmp_path):
    model = slope_fx.compile(models.llama(), adapter_rank=3, backend=None)
    slope_fx.save_pretrained(model, tmp_path / "sparse")
    want = slope_fx.preview(small(tmp_path), adapter_rank=3, measure=False, world_size=3)
    got = slope_fx.preview(tmp_path / "sparse", measure=False, world_size=3)
    assert got.sharding == want.sharding


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_world_that_cannot_be(tmp_path, size):
    with pytest.raises(ArgumentError, match=r"world_size=.*a whole number of ranks from 1 up"):
        slope_fx.preview(small(tmp_path), world_size=size)
