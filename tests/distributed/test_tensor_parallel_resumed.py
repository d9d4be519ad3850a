"""A run that tensor parallelism splits is saved, and goes on, also on other ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import slope_fx
from models import loss_of
from parallel import STEPS, adamw, batch, compiled, schedule_of, whole_state
from slope_fx.checkpoints import TrainingState
from slope_fx.errors import CheckpointError
from ways import WAYS, shares

STOPS = (5, STEPS // 2, 15)
"""In the sparse phase, where the adapters begin, and after."""
PARTS = 2
"""Parts of a batch, whose gradients are averaged by ranks or accumulated."""


class Run:
    def __init__(self, way, seed=0):
        self.way, self.share = way, shares(way, dist.get_world_size())
        self.model = compiled("llama", "aot_eager", seed, skip_first=False)
        WAYS[way](self.model)
        self.optimizer = adamw(self.model)
        self.schedule = schedule_of(self.model)
        self.state = {"training": TrainingState(self.model, self.optimizer, self.schedule)}

    def train(self, first, last):
        count, mine = self.share
        losses = []
        for step in range(first, last):
            own = [mine] if count == PARTS else list(range(PARTS))
            mean = torch.zeros(())
            for part in own:
                loss = loss_of(self.model, batch(step, part)) / len(own)
                loss.backward()
                mean += loss.detach()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            dist.all_reduce(mean)
            losses.append(mean.item() / dist.get_world_size())
        return losses


def saved(folder):
    """A run on 2 x 2 ranks, saved by DCP at each stop, and by save_pretrained at the last one."""
    run, losses, last = Run("FSDP2 x TP"), [], 0
    for stop in (*STOPS, STEPS):
        losses += run.train(last, stop)
        if stop < STEPS:
            dcp.save(run.state, checkpoint_id=f"{folder}/{stop}")
        if stop == STOPS[-1]:
            slope_fx.save_pretrained(
                run.model, f"{folder}/pretrained",
                training={"optimizer": run.optimizer, "schedule": run.schedule},
            )  # fmt: skip
        last = stop
    return losses, whole_state(run.model)


def by_dcp(folder, way):
    """What is left of the run from each stop, with other weights before."""
    ends = []
    for stop in STOPS:
        run = Run(way, seed=stop)
        dcp.load(run.state, checkpoint_id=f"{folder}/{stop}")
        ends.append((run.train(stop, STEPS), whole_state(run.model)))
    return ends


def by_pretrained(folder, way):
    stop, run = STOPS[-1], Run(way, seed=7)
    slope_fx.load_pretrained(f"{folder}/pretrained", run.model)
    slope_fx.load_training(
        f"{folder}/pretrained", {"optimizer": run.optimizer, "schedule": run.schedule}
    )
    return [(run.train(stop, STEPS), whole_state(run.model))]


def same(ends, want, stops, exact):
    for (losses, state), stop in zip(ends, stops, strict=True):
        assert losses == pytest.approx(want[0][stop:], abs=0 if exact else 2e-5)
        for name, tensor in want[1].items():
            far = (state[name].double() - tensor.double()).abs().max().item()
            assert far <= (0 if exact or tensor.dtype is torch.uint8 else 4e-4), name


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, ranks.run(4, saved, str(folder), timeout=300)[0]


@pytest.mark.full
@pytest.mark.parametrize(("world", "way"), [(4, "FSDP2 x TP"), (2, "TP"), (2, "FSDP2")])
def test_a_run_goes_on(world, way, whole, ranks):
    """On the same ranks bit for bit, on others within rounding."""
    folder, want = whole
    same(ranks.run(world, by_dcp, str(folder), way, timeout=300)[0], want, STOPS, world == 4)


@pytest.mark.full
@pytest.mark.parametrize(("world", "way"), [(4, "FSDP2 x TP"), (2, "TP")])
def test_a_checkpoint_is_loaded_into_a_split_model(world, way, whole, ranks):
    folder, want = whole
    ends = ranks.run(world, by_pretrained, str(folder), way, timeout=300)[0]
    same(ends, want, STOPS[-1:], world == 4)
    loaded = slope_fx.load_pretrained(f"{folder}/pretrained", backend=None)
    assert all(w.adapter_active for w in slope_fx.sparse_weights(loaded).values())


def differing(folder):
    """One group of ranks has another embedding, which tensor parallelism leaves alone."""
    run = Run("FSDP2 x TP")
    run.train(0, 1)
    with torch.no_grad():
        if dist.get_rank() % 2:
            run.model.model.embed_tokens.weight.to_local().add_(1)
    try:
        slope_fx.save_pretrained(run.model, folder)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.full
def test_groups_of_ranks_that_differ_are_refused(ranks, tmp_path):
    for said in ranks.run(4, differing, str(tmp_path / "c"), timeout=300):
        assert said.startswith("model.embed_tokens.weight differs between ranks 0 and 1")
    assert not list(tmp_path.iterdir())
