"""A checkpoint is loaded into a model that is sharded: each rank reads its part, and no more."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import models
import slope_fx
from checkpoint_cases import trained
from sharded_runs import STEPS, Run, differences, mesh_of, received, sent, shard, wholes
from slope_fx.checkpoints import tensors as files_of_tensors
from slope_fx.errors import ArgumentError, CheckpointError

HOW = {"backend": "eager", "on_fallback": "error"}


def saved(path):
    """A run in its adapter phase, saved with all of it by one process, and its end."""
    run = Run("bare")
    run.train(0, 8)
    slope_fx.save_pretrained(run.model, path, training=run.parts, max_shard_size=30_000)
    here = run.tensors()
    losses = run.train(8, STEPS)
    return losses, here, run.tensors()


def counting():
    """Counts the bytes that this rank reads of files of tensors."""
    read = []
    for name in ("read", "read_slice"):
        original = getattr(files_of_tensors.TensorReader, name)

        def counted(*args, original=original, **more):
            tensor = original(*args, **more)
            read.append(tensor.nbytes)
            return tensor

        setattr(files_of_tensors.TensorReader, name, counted)
    return read


def own_bytes(model):
    tensors = {id(t): t for t in model.state_dict().values()}.values()
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def on_a_mesh(path, shape):
    model = slope_fx.load_pretrained(path, device="meta", **HOW).train()
    assert all(parameter.is_meta for parameter in model.parameters())
    shard(model, mesh_of(*shape))
    read = counting()
    assert slope_fx.load_pretrained(path, model) is model
    masks = sum(p.to_local().nbytes for n, p in model.named_parameters() if n.endswith("_bits"))
    assert sum(read) <= own_bytes(model) + masks  # masks are read twice: checked, then loaded
    assert model.lm_head.weight is model.transformer.wte.weight
    here = wholes(model)
    run = Run("bare", model=model)
    slope_fx.load_training(path, run.parts)
    return run.train(8, STEPS), sent(here), sent(run.tensors())


@pytest.mark.parametrize(
    ("world", "shape"),
    [(2, (2,)), pytest.param(4, (2, 2), marks=pytest.mark.full)],
    ids=["FSDP2", "HSDP"],
)
def test_made_on_meta_sharded_and_loaded(world, shape, ranks, tmp_path):
    losses, here, end = saved(tmp_path / "c")
    for got in ranks.run(world, on_a_mesh, tmp_path / "c", shape):
        assert got[0] == pytest.approx(losses, rel=1e-5)
        assert not differences(received(got[1]), here)
        for name, tensor in received(got[2]).items():
            if tensor.dtype == torch.uint8:
                assert torch.equal(tensor, end[name]), name
            else:
                torch.testing.assert_close(tensor, end[name], atol=1e-4, rtol=1e-4, msg=name)


def test_loaded_over_a_model_of_one_process(tmp_path):
    model, _ = trained()
    path = slope_fx.save_pretrained(model, tmp_path / "c")
    other = slope_fx.compile(models.gpt2(), "2:4", adapter_rank=4, **HOW)
    values = [p for p in other.parameters()]
    slope_fx.load_pretrained(path, other)
    assert all(one is two for one, two in zip(values, other.parameters(), strict=True))
    assert not differences(dict(other.state_dict()), dict(model.state_dict()))
    assert all(weight.adapter_active for weight in slope_fx.sparse_weights(other).values())
    empty = slope_fx.load_pretrained(path, device="meta", **HOW)
    optimizer = torch.optim.SGD(empty.parameters(), lr=1)
    slope_fx.load_pretrained(path, empty)
    assert not differences(dict(empty.state_dict()), dict(model.state_dict()))
    assert {type(p) for n, p in empty.named_parameters() if n.endswith("_bits")} == {
        type(p) for n, p in model.named_parameters() if n.endswith("_bits")
    }
    with pytest.warns(slope_fx.errors.TrainingWarning, match="made before slope_fx.load"):
        optimizer.step()


def test_what_does_not_fit_is_refused(tmp_path):
    model, _ = trained()
    path = slope_fx.save_pretrained(model, tmp_path / "c")
    for sparsity, rank, words in (
        ("1:4", 4, "is 2:4 of shape .* and 1:4 of shape"),
        ("2:4", 3, "with an adapter of rank 4 in the checkpoint"),
        ({"*mlp*": "2:4"}, 4, "in the checkpoint and dense in the model"),
    ):
        other = slope_fx.compile(models.gpt2(), sparsity, adapter_rank=rank, **HOW)
        before = {name: t.clone() for name, t in other.state_dict().items()}
        with pytest.raises(CheckpointError, match=words):
            slope_fx.load_pretrained(path, other)
        assert not differences(dict(other.state_dict()), before)
    with pytest.raises(ArgumentError, match="dtype was given with a model that is compiled"):
        slope_fx.load_pretrained(path, model, dtype="bfloat16")
    with pytest.raises(ArgumentError, match="backend was given"):
        slope_fx.load_pretrained(path, model, backend="eager")


def damaged(path):
    """Rank 1's share of the files is damaged: all ranks refuse, and keep what they had."""
    model = slope_fx.compile(models.gpt2(), "2:4", adapter_rank=4, **HOW)
    shard(model)
    before = wholes(model)
    try:
        slope_fx.load_pretrained(path, model)
    except CheckpointError as error:
        return str(error), differences(before, wholes(model))
    return "", []


def test_a_file_that_one_rank_checks(ranks, tmp_path):
    path = slope_fx.save_pretrained(trained()[0], tmp_path / "c", max_shard_size=30_000)
    files = sorted(slope_fx.checkpoints.read_manifest(path).files)
    file = path / next(name for name in files[1::2] if name.endswith("safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    one, other = ranks.run(2, damaged, path)
    assert "SHA-256 differs" in one[0]
    assert "rank 1 failed" in one[0]
    assert "SHA-256 differs" in other[0]
    assert one[1] == other[1] == []


def staged(path):
    """A rank of a pipeline loads its half of the blocks."""
    rank = dist.get_rank()
    model = slope_fx.load_pretrained(path, device="meta", **HOW)
    for i in range(2):
        if i != rank:
            model.transformer.h[i] = nn.Identity()
    slope_fx.load_pretrained(path, model)
    return sent(dict(model.state_dict()))


def test_stages_load_their_parts(ranks, tmp_path):
    model, _ = trained()
    path = slope_fx.save_pretrained(model, tmp_path / "c")
    for rank, part in enumerate(map(received, ranks.run(2, staged, path))):
        assert any(name.startswith(f"transformer.h.{rank}") for name in part)
        assert not any(name.startswith(f"transformer.h.{1 - rank}") for name in part)
        want = {name: t for name, t in model.state_dict().items() if name in part}
        assert not differences(part, want)
