"""Pipelines of torch.distributed.pipelining train as one process does."""

import copy
import functools
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, SplitPoint, pipeline
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.pipelining.stage import build_stage

import slope_fx
from slope_fx.errors import (
    ArgumentWarning,
    ExpandedWeightWarning,
    NoEligibleLinearError,
    TrainingWarning,
)
from slope_fx.sparse.shards import whole

WIDTH, VOCABULARY = 32, 64
STEPS, REFRESH, ADAPTERS = 20, 3, 0.5
MICRO = 4  # micro-batches of a step
CPU = torch.device("cpu")
SCHEDULES = {
    "GPipe": ScheduleGPipe, "1F1B": Schedule1F1B, "Interleaved1F1B": ScheduleInterleaved1F1B,
}  # fmt: skip


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a residual."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)  # the gradient of a key bias is noise
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """A language model that runs without the parts that a stage does not have, as torchtitan's."""

    def __init__(self, layers):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(layers)})
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x):
        x = self.embed(x) if self.embed is not None else x
        for layer in self.layers.values():
            x = layer(x)
        x = self.norm(x) if self.norm is not None else x
        return self.head(x) if self.head is not None else x


def dense(layers):
    torch.manual_seed(0)
    return Decoder(layers)


def prune(model, first=True, **options):
    """Compile a model, or a stage of one whose input is made by another stage if not ``first``."""
    x = torch.zeros(1, 8, dtype=torch.long) if first else torch.zeros(1, 8, WIDTH)
    return slope_fx.compile(model, example_inputs=x, adapter_rank=4, **options)


def layers_of(index, stages, layers):
    return [str(i) for i in range(layers) if i * stages // layers == index]


def cut(model, index, stages):
    """A copy without the parts of other stages, as torchtitan makes it."""
    kept = layers_of(index, stages, len(model.layers))
    part = copy.deepcopy(model)
    for name in list(part.layers):
        if name not in kept:
            del part.layers[name]
    if index:
        part.embed = None
    if index < stages - 1:
        part.norm = part.head = None
    return part


class Part(Decoder):
    """A stage that calls modules of a whole model."""

    def __init__(self, model, index, stages):
        nn.Module.__init__(self)
        last = index == stages - 1
        self.embed = None if index else model.embed
        kept = layers_of(index, stages, len(model.layers))
        self.layers = nn.ModuleDict({name: model.layers[name] for name in kept})
        self.norm, self.head = (model.norm, model.head) if last else (None, None)


def of_one_model(layers, indices, stages, **options):
    """Stages that call the blocks of one compiled model, which each rank holds."""
    model = prune(dense(layers), region="blocks", **options)
    return {i: Part(model, i, stages) for i in indices}, [model]


def of_copies(layers, indices, stages, **options):
    """Copies of one compiled model, without the layers of other stages."""
    model = prune(dense(layers), **options)
    parts = {i: cut(model, i, stages) for i in indices}
    return parts, list(parts.values())


def one_by_one(layers, indices, stages, **options):
    """Stages that are compiled alone."""
    model = dense(layers)
    parts = {i: cut(model, i, stages) for i in indices}
    for i, part in parts.items():
        roles = {"skip_first": i == 0, "skip_head": i == stages - 1}
        try:
            prune(part, first=i == 0, **roles, **options)
        except NoEligibleLinearError:  # the head alone: it trains dense, without a Schedule
            continue
        same_adapters(part, prune(dense(layers), **options))
    return parts, [part for part in parts.values() if "_slope_fx" in part.__dict__]


def of_export(layers, indices, stages, **options):
    """Stages that torch's tracer splits from the dense model, compiled alone."""
    starts = {
        f"layers.{layers_of(i, stages, layers)[0]}": SplitPoint.BEGINNING for i in range(1, stages)
    }
    ids = torch.zeros(2, 8, dtype=torch.long)
    pipe = pipeline(dense(layers), mb_args=(ids,), split_spec=starts)
    parts = {i: pipe.get_stage_module(i) for i in indices}
    for i, part in parts.items():
        roles = {"skip_first": i == 0, "skip_head": i == stages - 1}
        prune(part, first=i == 0, **roles, **options)
        same_adapters(part, prune(dense(layers), **options))
    return parts, list(parts.values()), pipe.info()


FORMS = {form.__name__: form for form in (of_one_model, of_copies, one_by_one, of_export)}


def same_adapters(part, model):
    """Give a stage the random A of the whole model, which are drawn in the order of its layers."""
    wanted = slope_fx.sparse_weights(model)
    for name, weight in slope_fx.sparse_weights(part).items():
        weight.lora_A.data.copy_(wanted[name].lora_A)


def batch(step):
    """Token ids (8, 8) and the next ones."""
    ids = torch.randint(VOCABULARY, (8, 9), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def loss_of(logits, wanted):
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def optimizer_of(*modules):
    return torch.optim.AdamW([p for m in modules for p in m.parameters()], lr=1e-2)


def schedule_of(model):
    return slope_fx.Schedule(model, STEPS, ADAPTERS, REFRESH)


@functools.cache
def alone(layers, **options):
    """Losses and the state of a run in one process."""
    model = prune(dense(layers), **options)
    optimizer, schedule, losses = optimizer_of(model), schedule_of(model), []
    for step in range(STEPS):
        parts = zip(*(t.chunk(MICRO) for t in batch(step)), strict=True)
        micro = [loss_of(model(ids), wanted) / MICRO for ids, wanted in parts]
        for loss in micro:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(sum(loss.item() for loss in micro))
    return losses, {name: t.detach() for name, t in model.state_dict().items()}


def in_stages(form, kind, layers, stages, data, backend, path=None):
    """Losses (of the last stage), state, phases and fallbacks of a rank's stages.

    Args:
        data: number of ranks that share a stage by FSDP2. Ranks are (stage, data).
        path: where to save the model at the end, for which a rank has one stage.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size() // data, data), mesh_dim_names=("p", "d"))
    rank, group, world = mesh["p"].get_local_rank(), mesh["p"].get_group(), mesh["p"].size()
    indices = [i for i in range(stages) if i % world == rank]
    parts, models, *info = FORMS[form](layers, indices, stages, backend=backend)
    for part in parts.values() if data > 1 else ():
        for block in part.layers.values():
            fully_shard(block, mesh=mesh["d"])
        fully_shard(part, mesh=mesh["d"])
    made = [
        build_stage(part, i, *info, CPU, group) if info
        else PipelineStage(part, i, stages, CPU, group=group)
        for i, part in parts.items()
    ]  # fmt: skip
    optimizer = optimizer_of(*parts.values())
    schedules = [schedule_of(model) for model in models]
    several = issubclass(SCHEDULES[kind], PipelineScheduleMulti)
    run = SCHEDULES[kind](made if several else made[0], MICRO // data, loss_fn=loss_of)
    losses, last = [], stages - 1 in indices
    for step in range(STEPS):
        ids, wanted = (t.chunk(data)[mesh["d"].get_local_rank()] for t in batch(step))
        micro = []
        run.step(*[ids] * (0 in indices), **({"target": wanted, "losses": micro} if last else {}))
        optimizer.step()
        optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
        if last:
            losses.append(sum(loss.item() for loss in micro) / len(micro))
    state = {}
    for part in parts.values():
        state |= {name: whole(t.detach()) for name, t in part.state_dict().items()}
    if path is not None:
        (model,) = models
        slope_fx.save_pretrained(model, path, training={"schedule": schedules[0]})
    reasons = [row.reason for m in models for row in slope_fx.explain(m).sparse if row.reason]
    return losses, state, [schedule.phase for schedule in schedules], reasons


def strictly(*args):
    """:func:`in_stages`, without a warning of ours on any rank."""
    with warnings.catch_warnings():
        for kind in (ArgumentWarning, ExpandedWeightWarning, TrainingWarning):
            warnings.simplefilter("error", kind)
        return in_stages(*args)


def check(ranks, world, form, kind, layers, stages, data=1, backend="aot_eager"):
    """Train on ranks and in one process: the same losses and weights, and no other bit of a mask.

    The order of additions is that of one process, unless FSDP2 averages gradients.
    """
    losses, want = alone(layers, backend=backend)
    results = ranks.run(world, strictly, form, kind, layers, stages, data, backend)
    got = [result[0] for result in results if result[0]]
    assert len(got) == data
    mean = [sum(each) / data for each in zip(*got, strict=True)]
    state = {}
    for _, part, phases, reasons in results:
        state |= part
        assert set(phases) <= {"adapter"}
        assert reasons == []
    assert set(state) == set(want)
    worst = max(
        ((state[name].double() - want[name].double()).abs().max().item(), name) for name in want
    )
    print(f"losses {max(abs(a - b) for a, b in zip(mean, losses, strict=True))}, weights {worst}")
    assert mean == pytest.approx(losses, abs=1e-5)
    assert worst[0] < 5e-4
    for name, tensor in want.items():
        assert tensor.dtype is not torch.uint8 or torch.equal(state[name], tensor), name
    # The adapters take part: a wrong one would show.
    assert max(tensor.abs().max() for name, tensor in want.items() if "lora_B" in name) > 0.03


CASES = {
    ("one_by_one", "1F1B"), ("of_copies", "Interleaved1F1B"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        pytest.param(form, kind, marks=() if (form, kind) in CASES else pytest.mark.full)
        for form in FORMS
        for kind in SCHEDULES
    ],
)
def test_two_ranks(ranks, form, kind):
    """Both phases, refreshes, micro-batches. Interleaved1F1B has two stages a rank."""
    check(ranks, 2, form, kind, layers=4, stages=4 if kind == "Interleaved1F1B" else 2)


@pytest.mark.full
def test_inductor(ranks):
    check(ranks, 2, "one_by_one", "1F1B", layers=2, stages=2, backend="inductor")


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_four_ranks(ranks, form, kind):
    stages = 8 if kind == "Interleaved1F1B" else 4
    check(ranks, 4, form, kind, layers=stages, stages=stages)


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
def test_inductor_on_four_ranks(ranks, form):
    check(ranks, 4, form, "1F1B", layers=4, stages=4, backend="inductor")


@pytest.mark.full
@pytest.mark.parametrize("form", ["of_copies", "one_by_one"])
def test_stages_sharded_by_fsdp2(ranks, form):
    """Two stages on two ranks each."""
    check(ranks, 4, form, "1F1B", layers=4, stages=2, data=2)


@pytest.mark.parametrize("form", ["of_copies", "one_by_one"])
def test_a_stage_without_sparse_layers(ranks, form):
    """The last stage is the head. A copy of the model has a Schedule in step there."""
    check(ranks, 2, form, "GPipe", layers=1, stages=2)


@pytest.mark.parametrize(
    ("form", "data"),
    [
        ("of_copies", 1),
        pytest.param("one_by_one", 1, marks=pytest.mark.full),
        pytest.param("of_one_model", 1, marks=pytest.mark.full),
        pytest.param("of_copies", 2, marks=pytest.mark.full),
        pytest.param("one_by_one", 2, marks=pytest.mark.full),
    ],
)
def test_a_checkpoint_of_stages_is_the_whole_model(ranks, tmp_path, form, data):
    """Saved after a training by all ranks, and loaded by one process."""
    args = form, "1F1B", 4, 2, data, "aot_eager", str(tmp_path / "c")
    state = {}
    for _, part, *_ in ranks.run(2 * data, in_stages, *args):
        state |= part
    loaded = slope_fx.load_pretrained(tmp_path / "c", dense(4), backend="aot_eager")
    got = loaded.state_dict()
    assert set(got) == set(state)
    for name, tensor in state.items():
        assert torch.equal(got[name], tensor), name
    assert all(weight.adapter_active for weight in slope_fx.sparse_weights(loaded).values())
    assert loaded(batch(0)[0]).isfinite().all()
