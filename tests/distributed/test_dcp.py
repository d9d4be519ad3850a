"""Runs are saved by torch.distributed.checkpoint and resumed on other numbers of ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from transformers import AutoModelForCausalLM

import slope_fx
from sharded_runs import STEPS, Run, differences, received, sent
from slope_fx import cli
from slope_fx.checkpoints import TrainingState


def state_of(run):
    return {"training": TrainingState(run.model, run.optimizer, run.schedule, rates=run.rates)}


STOPS = (0, 3, 6, 9)
"""Before the first step, in the sparse phase, where the adapters begin, and after."""


def saved(path, how):
    """A run that is saved on its way: its losses and its end. The last save is asynchronous."""
    run = Run(how)
    losses = []
    for stop, end in zip(STOPS, (*STOPS[1:], STEPS), strict=True):
        before = run.moments()
        if stop == STOPS[-1]:
            group = dist.new_group(backend="gloo")  # the training goes on using its own
            writing = dcp.async_save(
                state_of(run), checkpoint_id=f"{path}/{stop}", process_group=group
            )
            losses += run.train(stop, stop + 1)  # the copy is not disturbed
            writing.result()
            losses += run.train(stop + 1, end)
        else:
            dcp.save(state_of(run), checkpoint_id=f"{path}/{stop}")
            assert not differences(run.moments(), before)
            losses += run.train(stop, end)
    return losses, sent(run.tensors())


def loaded(path, how, stops):
    """The rest of the run from each stop, loaded over a model in the phase of the last one."""
    torch.manual_seed(7)
    run, ends = Run(how), []
    for stop in stops:
        dcp.load(state_of(run), checkpoint_id=f"{path}/{stop}")
        assert run.schedule.last_step == stop
        assert run.schedule.phase == ("adapter" if stop >= STEPS // 2 else "sparse")
        if stop <= STEPS // 2:  # fresh moments in the first step of the adapters
            for weight in slope_fx.sparse_weights(run.model).values():
                assert not run.optimizer.state.get(weight.lora_B)
        ends.append((run.train(stop, STEPS), sent(run.tensors())))
    return ends


@pytest.fixture(scope="module")
def of_two(ranks, tmp_path_factory):
    path = tmp_path_factory.mktemp("of_two")
    return path, ranks.run(2, saved, path, "fsdp")[0]


@pytest.mark.full
def test_the_same_ranks_go_on_exactly(of_two, ranks):
    path, (losses, end) = of_two
    stops = (9, 3, 0, 6)  # a fresh model takes adapters' moments; a later one must drop its own
    for stop, (got, tensors) in zip(
        stops, ranks.run(2, loaded, path, "fsdp", stops)[1], strict=True
    ):
        assert got == losses[stop:]
        assert not differences(received(tensors), received(end))


def agrees(got, want, stop):
    assert got[0] == pytest.approx(want[0][stop:], rel=1e-5)
    for name, tensor in received(got[1]).items():
        expected = received(want[1])[name]
        if tensor.dtype == torch.uint8:
            assert torch.equal(tensor, expected), name
        else:
            torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "how"), [(1, "bare"), (2, "ddp"), pytest.param(4, "fsdp", marks=pytest.mark.full)]
)
def test_other_ranks_go_on_within_rounding(world, how, of_two, ranks):
    path, want = of_two
    for stop, got in zip((9, 3), ranks.run(world, loaded, path, how, (9, 3))[0], strict=True):
        agrees(got, want, stop)


@pytest.mark.full
def test_one_process_goes_on_as_two(ranks, tmp_path):
    want = ranks.run(1, saved, tmp_path, "bare")[0]
    for stop, got in zip((9, 3), ranks.run(2, loaded, tmp_path, "fsdp", (9, 3))[0], strict=True):
        agrees(got, want, stop)


def plain(path):
    """As the documentation of torch has it, in one phase: the new run is brought into it first."""
    run, states = Run("fsdp"), {}
    losses = []
    for stop, end in ((3, 9), (9, STEPS)):
        losses += run.train(len(losses), stop)
        model, optimizer = get_state_dict(run.model, run.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=f"{path}/{stop}")
        states[stop] = run.schedule.state_dict(), run.rates.state_dict()
        losses += run.train(stop, end)
    for stop in states:
        again = Run("fsdp")
        again.schedule.load_state_dict(states[stop][0])
        again.rates.load_state_dict(states[stop][1])
        model, optimizer = get_state_dict(again.model, again.optimizer)
        state = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=f"{path}/{stop}")
        set_state_dict(
            again.model, again.optimizer, model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )  # fmt: skip
        assert again.train(stop, STEPS) == losses[stop:]
        assert not differences(again.tensors(), run.tensors())


def test_the_functions_of_torch_in_one_phase(ranks, tmp_path):
    ranks.run(2, plain, tmp_path)


@pytest.mark.full
def test_a_folder_of_dcp_becomes_a_checkpoint_and_back(of_two, ranks, tmp_path):
    """The run goes on from each of them; nothing is lost on the way."""
    path, want = of_two
    for stop in (9, 3):
        command = ["convert", f"{path}/{stop}", f"{tmp_path}/c{stop}", "--to", "sparse"]
        assert cli.main(command) == 0
        checkpoint = tmp_path / f"c{stop}"
        assert slope_fx.checkpoints.verify(checkpoint).adapters_active == (7 if stop == 9 else 0)
        model = slope_fx.load_pretrained(checkpoint, backend="eager", on_fallback="error").train()
        run = Run("bare", model=model)
        assert slope_fx.load_training(checkpoint, run.parts) == {}
        agrees((run.train(stop, STEPS), sent(run.tensors())), want, stop)
        assert cli.main(["convert", str(checkpoint), f"{tmp_path}/{stop}", "--to", "dcp"]) == 0
    results = ranks.run(2, loaded, tmp_path, "fsdp", (9, 3))[1]
    for stop, (got, tensors) in zip((9, 3), results, strict=True):
        assert got == want[0][stop:]
        assert not differences(received(tensors), received(want[1]))


def safetensors(path):
    """The model alone in shards of safetensors files: written by FSDP2, read by DDP."""
    run = Run("fsdp")
    run.train(0, 8)
    state = get_model_state_dict(run.model)
    del state["lm_head.weight"]  # tied to the embedding, and safetensors takes a tensor once
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    dcp.save(state, storage_writer=writer)
    other = Run("ddp")
    state = get_model_state_dict(other.model)
    del state["lm_head.weight"]
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path)))
    set_model_state_dict(other.model, state, options=StateDictOptions(strict=False))
    assert not differences(other.tensors(), run.tensors())
    assert all(w.adapter_active for w in slope_fx.sparse_weights(other.model).values())


def test_safetensors_of_dcp(ranks, tmp_path):
    ranks.run(2, safetensors, tmp_path / "c")


@pytest.mark.full
def test_consolidated_safetensors(ranks, tmp_path):
    """By ``slope-fx convert``, for torch's consolidation takes no masks, as the page says."""
    ranks.run(2, saved_once, tmp_path / "dcp")
    for source, target, to in (("dcp", "sparse", "sparse"), ("sparse", "dense", "dense")):
        assert (
            cli.main(["convert", f"{tmp_path}/{source}", f"{tmp_path}/{target}", "--to", to]) == 0
        )
    run = Run("bare")
    run.train(0, 8)
    loaded = slope_fx.load_pretrained(tmp_path / "sparse", backend="eager", on_fallback="error")
    for name, tensor in run.tensors().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=1e-4, rtol=1e-4)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    want = slope_fx.densify(run.model).state_dict()
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(tensor, want[name], atol=1e-4, rtol=1e-4)

    writer = HuggingFaceStorageWriter(
        f"{tmp_path}/torch", save_distributed=True, enable_consolidation=True
    )
    state = {n: t.clone() for n, t in run.tensors().items()}
    with pytest.raises(CheckpointException, match="requires a floating point input type"):
        dcp.save(state, storage_writer=writer, no_dist=True)


def saved_once(path):
    run = Run("fsdp")
    run.train(0, 8)
    dcp.save(state_of(run), checkpoint_id=path)
