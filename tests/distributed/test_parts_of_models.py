"""Ranks that hold or train different parts of a model save all of it, or refuse."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import models
import slope_fx
from models import batch
from sharded_runs import differences, received, sent
from slope_fx.checkpoints import saving, writing
from slope_fx.errors import CheckpointError

HOW = {"backend": "eager", "on_fallback": "ignore"}


def llama():
    torch.manual_seed(0)
    return slope_fx.compile(models.llama(4), "2:4", adapter_rank=2, **HOW)


def staged(path, delete):
    """Each rank trains its half of the blocks, with refreshes: as stages of a pipeline do.

    Returns:
        The rank's own tensors, and what the checkpoint has.
    """
    rank = dist.get_rank()
    model = llama()
    blocks = model.model.layers
    own = [blocks[i] for i in range(4) if i // 2 == rank]
    ends = [model.model.embed_tokens] if rank == 0 else [model.model.norm, model.lm_head]
    if delete:
        for i in range(4):
            if i // 2 != rank:
                blocks[i] = nn.Identity()
        if rank == 0:
            model.lm_head = None
        else:
            model.model.embed_tokens = None
    optimizer = torch.optim.AdamW([p for m in (*own, *ends) for p in m.parameters()], lr=1e-2)
    schedule = slope_fx.Schedule(model, 6, 0.5, backward_mask_interval=1)
    position = model.model.rotary_emb(torch.zeros(1, 16, 32), torch.arange(16)[None])
    for step in range(6):
        torch.manual_seed(step)
        h = torch.randn(2, 16, 32)
        for block in own:
            h = block(h, position_embeddings=position)
        for end in ends:
            h = end(batch(step)) if isinstance(end, nn.Embedding) else end(h)
        h.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    slope_fx.save_pretrained(
        model, path, training={"optimizer": optimizer, "schedule": schedule}, max_shard_size=9_000
    )
    prefixes = tuple(
        [f"model.layers.{i}." for i in range(4) if i // 2 == rank]
        + (["model.embed_tokens."] if rank == 0 else ["model.norm.", "lm_head."])
    )
    mine = {n: t.detach() for n, t in model.state_dict().items() if n.startswith(prefixes)}

    again = torch.optim.AdamW([p for m in (*own, *ends) for p in m.parameters()], lr=1e-2)
    slope_fx.load_training(path, {"optimizer": again})
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            assert torch.equal(again.state[parameter][key], value)
    return sent(mine)


@pytest.mark.parametrize("delete", [False, True], ids=["whole on each rank", "parts deleted"])
def test_stages_are_saved_whole(delete, ranks, tmp_path):
    parts = ranks.run(2, staged, tmp_path / "c", delete)
    want = received({**parts[0], **parts[1]})
    loaded = slope_fx.load_pretrained(tmp_path / "c", **HOW)
    assert not differences(loaded.state_dict(), want)
    assert all(w.adapter_active for w in slope_fx.sparse_weights(loaded).values())
    assert slope_fx.checkpoints.verify(tmp_path / "c").adapters > 4
    optimizer = torch.optim.AdamW(loaded.parameters())
    with pytest.raises(CheckpointError, match=r"'optimizer' was saved by 2 ranks"):
        slope_fx.load_training(tmp_path / "c", {"optimizer": optimizer})


def changed(path, kind):
    """Ranks whose contents differ without a reason."""
    model, rank = llama(), dist.get_rank()
    weight = model.model.layers[1].mlp.up_proj
    if kind == "both trained":
        optimizer = torch.optim.SGD(weight.parameters(), lr=0.1)
        weight.weight_values.grad = torch.full_like(weight.weight_values, rank + 1.0)
        optimizer.step()
    elif kind == "a mask":
        bits = model.model.layers[1].mlp.up_proj.weight_sparse.forward_bits
        if rank:
            bits.data = bits.flip(0)
    elif kind == "the pattern" and rank:
        torch.manual_seed(0)
        model = slope_fx.compile(models.llama(4), "1:4", adapter_rank=2, **HOW)
    elif kind == "the phase" and rank:
        slope_fx.Schedule(model, 1, 0.0)
    elif kind == "other numbers" and rank:
        with torch.no_grad():
            weight.weight_values.add_(1)
    elif kind == "a frozen step":  # as torch.distributed.checkpoint takes
        optimizer = torch.optim.SGD(weight.parameters(), lr=0.0)
        weight.weight_values.grad = torch.ones_like(weight.weight_values)
        optimizer.step()
        with torch.no_grad():
            weight.weight_values.add_(rank)
    try:
        slope_fx.save_pretrained(model, path)
    except CheckpointError as error:
        return str(error)
    return ""


WORDS = {
    "both trained": "up_proj.weight_values differs between ranks 0 and 1, and both have trained",
    "other numbers": "up_proj.weight_values differs between ranks 0 and 1, and no optimizer",
    "a frozen step": "up_proj.weight_values differs between ranks 0 and 1, and no optimizer",
    "a mask": "up_proj.weight_sparse.forward_bits differs",
    "the pattern": "Compile the model in the same way on all ranks",
    "the phase": "an idle adapter of rank 2 on rank 0 and 2:4 of shape",
}


@pytest.mark.parametrize("kind", WORDS)
def test_ranks_that_disagree_are_refused(kind, ranks, tmp_path):
    path = tmp_path / "c"
    for message in ranks.run(2, changed, path, kind):
        assert WORDS[kind] in message
    assert os.listdir(tmp_path) == []


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.mid, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.last(self.mid(self.norm(self.first(x)).relu()).relu())


def counted(path):
    """BatchNorm counts each rank's own batches. DDP takes the first rank's, and so does saving."""
    torch.manual_seed(0)
    model = slope_fx.compile(Normalized(), "2:4", example_inputs=torch.randn(4, 16), **HOW)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(dist.get_rank())
    wrapped(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()
    slope_fx.save_pretrained(model, path)
    return sent({n: t.detach() for n, t in model.state_dict().items()})


def test_buffers_may_differ(ranks, tmp_path):
    one, other = map(received, ranks.run(2, counted, tmp_path / "c"))
    assert differences(one, other) == ["norm.running_mean", "norm.running_var"]
    loaded = slope_fx.load_pretrained(tmp_path / "c", Normalized(), **HOW)
    assert not differences(loaded.state_dict(), one)


def failing(path, where, rank):
    """A rank fails in the middle of a write over an earlier checkpoint."""
    model = llama()
    slope_fx.save_pretrained(model, path, max_shard_size=9_000)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(1)
    training = None
    if where == "pickle":
        training = {"x": object() if dist.get_rank() == rank else 1}
    owner, name = BROKEN.get(where, (writing, "STEM"))
    original = getattr(owner, name)
    if dist.get_rank() == rank and where in BROKEN:
        setattr(owner, name, _no_space)
    try:
        slope_fx.save_pretrained(model, path, training=training, max_shard_size=9_000)
    except CheckpointError as error:
        return str(error)
    finally:
        setattr(owner, name, original)
    return ""


def _no_space(*args, **more):
    raise OSError(28, "No space left on device")


BROKEN = {
    "a tensor": (writing.TensorWriter, "add"),
    "the end of a file": (writing.TensorWriter, "close"),
    "the configuration": (saving, "write_configuration"),
}


@pytest.mark.parametrize(
    ("where", "rank"),
    [
        ("a tensor", 0),
        ("a tensor", 1),
        ("the end of a file", 1),
        ("the configuration", 0),
        ("pickle", 1),
    ],
)
def test_a_failure_on_one_rank_is_one_on_all(where, rank, ranks, tmp_path):
    """And the earlier checkpoint stays."""
    path = tmp_path / "c"
    messages = ranks.run(2, failing, path, where, rank, timeout=60)
    words = "pickle" if where == "pickle" else "No space left"
    assert words in messages[rank]
    assert f"rank {rank} failed" in messages[1 - rank]
    assert words in messages[1 - rank]
    assert os.listdir(tmp_path) == ["c"]
    assert not differences(slope_fx.load_pretrained(path, **HOW).state_dict(), llama().state_dict())
