"""What stages of a pipeline, and models that transformers split, do and are told."""

import copy
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, SplitPoint, pipeline
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.distributed import DistributedConfig

import models
import slope_fx
from models import batch, loss_of
from slope_fx.errors import ArgumentWarning, NoEligibleLinearError, UnsupportedError
from slope_fx.sparse.shards import whole


class Layers(nn.Module):
    """Linears without residuals: the last one of each stage looks like an output head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


def told(how):
    """The warnings of one step of two stages."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model, x, options = Layers(), torch.randn(4, 16), {"backend": "aot_eager", "region": "model"}
    if how == "cut from a model":
        slope_fx.compile(model, example_inputs=x, **options)
    model.layers = model.layers[3 * rank : 3 * rank + 3]
    if how != "cut from a model":
        roles = {"skip_first": rank == 0, "skip_head": rank == 1} if how == "roles" else {}
        slope_fx.compile(model, example_inputs=x, **roles, **options)
    run = ScheduleGPipe(
        PipelineStage(model, rank, 2, torch.device("cpu")), 2, lambda y, wanted: (y - wanted).mean()
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            run.step(*[x] * (rank == 0), **({"target": x} if rank == 1 else {}))
    sparse = [name for name in slope_fx.sparse_weights(model)]
    return sparse, [str(w.message) for w in seen if issubclass(w.category, ArgumentWarning)]


def test_stages_compiled_as_whole_models_are_told(ranks):
    (first, of_first), (second, of_second) = ranks.run(2, told, "no roles")
    assert (first, second) == (["layers.1"], ["layers.1"])
    assert len(of_first) == len(of_second) == 1
    assert of_first[0].startswith("Stage 0 of 2 was compiled alone")
    assert "whole model: layers.2 stays dense, output head (skip_head)." in of_first[0]
    assert "layers.0 stays dense, fed directly by the model's input (skip_first)." in of_second[0]


def test_stages_with_their_roles_are_told_nothing(ranks):
    """Each has the sparse layers that it has in the whole model, also as a part of it."""
    want = [(["layers.1", "layers.2"], []), (["layers.0", "layers.1"], [])]
    assert ranks.run(2, told, "roles") == want
    want[1] = ["layers.3", "layers.4"], []  # the names in the whole model
    assert ranks.run(2, told, "cut from a model") == want


def test_a_part_of_a_compiled_model():
    """Copies, averages and dense copies of a model without some blocks; explain says which."""
    model = slope_fx.compile(models.llama(6), adapter_rank=2, backend="eager")
    x = torch.randn(2, 8, 32)
    last = copy.deepcopy(model)
    last.model.layers = last.model.layers[3:]
    first = copy.deepcopy(model)
    first.model.layers = first.model.layers[:3]
    first.lm_head = first.model.norm = nn.Identity()
    for part in (first, last):
        want = part(inputs_embeds=x).logits
        other = copy.deepcopy(part)
        assert torch.equal(other(inputs_embeds=x).logits, want)
        assert all(row.reason == "" for row in slope_fx.explain(other).sparse)
        assert len(slope_fx.sparse_weights(other)) == (21 if part is last else 18)
        average = torch.optim.swa_utils.AveragedModel(part)
        average.update_parameters(part)
        dense = slope_fx.densify(part)
        torch.testing.assert_close(dense(inputs_embeds=x).logits, want)
        rows = {row.name: row for row in slope_fx.explain(part).linears}
        gone = rows[f"model.layers.{0 if part is last else 5}.mlp.up_proj"]
        assert gone.reason == "its layer was removed, moved or replaced after compile"
        assert (gone.bytes_after, gone.state_after) == (0, 0)


def test_a_part_without_sparse_layers_keeps_step():
    model = slope_fx.compile(models.llama(), adapter_rank=2, backend="eager")
    model.model.layers = nn.ModuleList()
    schedule = slope_fx.Schedule(model, 4, adapter_start=0.5)
    phases = []
    for _ in range(4):
        schedule.step()
        phases.append(schedule.phase)
    assert phases == ["sparse", "adapter", "adapter", "adapter"]
    copy.deepcopy(model)
    with pytest.raises(NoEligibleLinearError):
        slope_fx.compile(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64)))


def split(compiled):
    model = Layers()
    if compiled:
        slope_fx.compile(model, example_inputs=torch.randn(4, 16), backend="eager")
    try:
        pipe = pipeline(model, (torch.randn(4, 16),), split_spec={"layers.3": SplitPoint.BEGINNING})
    except RuntimeError as error:
        return type(error.__cause__), str(error.__cause__)
    return pipe.num_stages


def test_the_tracer_takes_the_dense_model_only(ranks):
    assert ranks.run(1, split, False) == [2]
    ((kind, message),) = ranks.run(1, split, True)
    assert kind is UnsupportedError
    assert "layers.1: torch.distributed.pipelining.pipeline can't split a model" in message


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, vocab_size=models.VOCABULARY,
            max_position_embeddings=32, router_jitter_noise=0.0,
        )
    )  # fmt: skip


def compile_split(kind, folder, config):
    names = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in names.items()}
    try:
        model = kind.from_pretrained(folder, distributed_config=DistributedConfig(**config))
    finally:
        for name in names:
            del os.environ[name]
    try:
        slope_fx.compile(model)
    except UnsupportedError as error:
        return str(error)


def test_models_that_transformers_split_are_refused(ranks, tmp_path):
    mixtral().save_pretrained(tmp_path / "experts")
    models.llama().save_pretrained(tmp_path / "layers")
    config = {"ep_size": 2, "fsdp_size": 2}
    for said in ranks.run(2, compile_split, MixtralForCausalLM, tmp_path / "experts", config):
        assert said.startswith("model.layers.0.mlp.experts, model.layers.1.mlp.experts: trans")
        assert "Load the model without ep_size" in said
    kind = type(models.llama())
    for said in ranks.run(2, compile_split, kind, tmp_path / "layers", {"pp_size": 2}):
        assert "transformers split its layers between ranks (pp_size)" in said


def experts(sharded):
    """Losses, and the last backward mask of some experts. Ranks train on different rows."""
    model = slope_fx.compile(mixtral(), adapter_rank=2, backend="aot_eager")
    rank, world = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    if sharded:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = slope_fx.Schedule(model, 20, 0.5, 3)
    losses = []
    for step in range(20):
        loss = loss_of(model, batch(seed=step, rows=4).chunk(world)[rank])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    weight = slope_fx.sparse_weights(model)["model.layers.1.mlp.experts.down_proj"]
    return losses, whole(weight.backward_bits).tolist()


@pytest.mark.full
def test_sparse_experts_are_sharded_by_fsdp2(ranks):
    """What the refusal of expert parallelism advises."""
    losses, bits = experts(sharded=False)
    results = ranks.run(2, experts, True)
    mean = [sum(pair) / 2 for pair in zip(*(result[0] for result in results), strict=True)]
    assert mean == pytest.approx(losses, abs=1e-4)
    assert all(result[1] == bits for result in results)
