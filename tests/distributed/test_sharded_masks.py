"""Masks and idle adapters of sharded models: what moves, and what no write loses."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import models
import slope_fx
from parallel import adamw, batch, compiled, schedule_of, whole_state
from sent import counting


def shard(model, **more):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, **more)
    return fully_shard(model, mesh=mesh, **more)


def sent_in_a_step(rank, start=1.0):
    model = compiled("llama", "eager", adapter_rank=rank)
    shard(model)
    schedule = schedule_of(model, adapter_start=start, backward_mask_interval=1)
    with counting() as step:
        models.loss_of(model, batch(0, 0)).backward()
    with counting() as refresh:
        schedule.step()
    values = sum(weight.values.numel() * 4 for weight in slope_fx.sparse_weights(model).values())
    return step, refresh, values // dist.get_world_size()


def test_idle_adapters_are_not_gathered(ranks):
    (without, _, values), _ = ranks.run(2, sent_in_a_step, None)
    (idle, _, _), _ = ranks.run(2, sent_in_a_step, 8)
    (awake, _, _), _ = ranks.run(2, sent_in_a_step, 8, 0.0)
    assert idle == without
    assert without["all_gather"] > values
    assert awake["all_gather"] > without["all_gather"] + values / 10


@pytest.mark.parametrize("world", [2, 3])
def test_a_refresh_sends_rows_of_incomplete_groups_alone(ranks, world):
    """Nothing if each rank has whole groups of M rows; else at most M - 1 rows to each side."""
    for _, refresh, values in ranks.run(world, sent_in_a_step, None):
        assert set(refresh) <= {"all_to_all"}
        assert (refresh["all_to_all"] > 0) == (world == 3)
        assert refresh["all_to_all"] < values / 2


def refreshed(rows, columns, pattern, dtype, seed, ignored):
    """The backward mask of a sharded layer, beside that of the whole layer."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(columns, rows, dtype=dtype))
    options = {"example_inputs": torch.randn(2, columns, dtype=dtype), "backend": "eager"}
    model = slope_fx.compile(net, pattern, skip_first=False, skip_head=False, **options)
    (weight,) = slope_fx.sparse_weights(model).values()
    torch.nn.init.normal_(weight.values)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    masks = {weight.forward_bits, weight.backward_bits} if ignored else set()
    weight_before = weight.forward_bits.clone()
    fully_shard(model, mesh=mesh, ignored_params=masks)
    weight.refresh_backward_mask()
    values, got = weight.values.full_tensor(), weight.backward_bits
    got = got.full_tensor() if isinstance(got, DTensor) else got
    return values, weight_before, got.clone()


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(
    ("world", "rows", "pattern", "dtype"),
    [
        (2, 16, "2:4", torch.float32),
        (3, 16, "2:4", torch.float32),  # 6, 6 and 4 rows
        (4, 8, "4:8", torch.bfloat16),  # a group over all ranks
        (4, 16, "2:8", torch.float32),
        (4, 8, "1:4", torch.float32),
        (3, 8, "2:8", torch.float32),  # 3, 3 and 2 rows
        (4, 4, "2:4", torch.float32),  # one row a rank
        (3, 4, "2:4", torch.float32),  # a rank without rows
    ],
)
def test_a_mask_chosen_on_shards_is_that_of_the_whole(ranks, world, rows, pattern, dtype, ignored):
    n, m = map(int, pattern.split(":"))
    for seed in range(3):
        got = ranks.run(world, refreshed, rows, 32, pattern, dtype, seed, ignored)
        for values, forward, bits in got:
            assert torch.equal(bits, slope_fx.ops.backward_mask(values, forward, n, m))


def after_an_evaluation(model_kind, outer):
    """The whole parameters are in the modules when the Schedule steps."""
    model = compiled(model_kind, "eager")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wrapped = torch.nn.Sequential(model) if outer else model
    fully_shard(wrapped, mesh=mesh)
    optimizer = adamw(model)
    schedule = schedule_of(model, backward_mask_interval=1, adapter_start=1.0)
    for step in range(3):
        ids = batch(step, dist.get_rank())
        (wrapped(ids) if outer else model(input_ids=ids)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            wrapped(ids) if outer else model(input_ids=ids)
        if outer and not isinstance(next(model.parameters()), DTensor):
            with pytest.raises(slope_fx.errors.StateError, match=r"reshard\(\) before"):
                schedule.step()
            wrapped.reshard()
            for weight in slope_fx.sparse_weights(model).values():
                weight.refresh_backward_mask()
        else:
            schedule.step()
    wrapped.reshard()
    state = whole_state(model)
    wanted = {}
    for name in [n for n in state if n.endswith("weight_values")]:
        beside = name.replace("weight_values", "weight_sparse.")
        kept, forward = state[name], state[f"{beside}forward_bits"]
        wanted[f"{beside}backward_bits"] = slope_fx.ops.backward_mask(kept, forward, 2, 4)
    return {name: bool(torch.equal(state[name], bits)) for name, bits in wanted.items()}


@pytest.mark.parametrize("outer", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_refresh_after_an_evaluation_is_not_lost(ranks, outer):
    for same in ranks.run(2, after_an_evaluation, "llama", outer):
        assert len(same) > 5
        assert all(same.values()), same
