"""Ranks of ``examples/pretrain_fsdp.py`` that are killed at random moments, against a whole run.

torchrun starts the example on two ranks. A random rank gets a SIGKILL: while it starts, computes,
writes a checkpoint or ends. ``--max-restarts`` starts all ranks again, and they go on from the last
checkpoint. In the end the losses, the model, the optimizer's state and the random states must be
those of a run without kills, bit for bit. A third run goes on at other world sizes.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import commit
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kill_ranks.json"
SAVE_EVERY = 2
TINY = [
    "--layers", "2", "--width", "32", "--heads", "2", "--context", "32", "--batch-size", "6",
    "--vocab-size", "300", "--warmup", "2", "--adapter-start", "0.5", "--adapter-rank", "4",
    "--backward-mask-interval", "3", "--save-every", str(SAVE_EVERY), "--backend", "eager",
    "--device", "cpu", "--prompt", "the quick",
]  # fmt: skip
PATIENCE = 1800.0
"""Seconds until a wait for the run is given up."""


class Job:
    """A run of the example that goes on meanwhile.

    Args:
        out: folder of the run.
        command: what starts torchrun.
        environment: its environment variables.
    """

    def __init__(self, out: Path, command: Sequence[str], environment: dict[str, str]) -> None:
        self.messages = out.with_name(f"{out.name}.txt")
        with self.messages.open("a") as messages:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=messages, stderr=subprocess.STDOUT
            )

    @classmethod
    def on(cls, world: int, out: Path, arguments: Sequence[str], restarts: int = 0) -> "Job":
        """The example on ``world`` ranks, which may be started again ``restarts`` times."""
        before = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *before]),
            # Or torch reads the addresses of ranks that died (pytorch#135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(world), "--max-restarts", str(restarts),
        ]  # fmt: skip
        example = [str(ROOT / "examples" / "pretrain_fsdp.py"), "--out", str(out), *arguments]
        return cls(out, torchrun + example, environment)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in descendants(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self.process.terminate()
        self.process.wait()

    def ranks(self, life: int) -> dict[int, int]:
        """Rank -> process id, of the ranks that were started ``life`` restarts later."""
        found = {}
        for pid in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
                environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                if environment.get("TORCHELASTIC_RESTART_COUNT") == str(life):
                    found[int(environment["RANK"])] = pid
        return found

    def wait_for(self, what: Callable[[], object], every: float = 0.002) -> None:
        """Wait until ``what``, called every so many seconds, returns a true value."""
        deadline = time.monotonic() + PATIENCE
        while not what():
            self.check(time.monotonic() < deadline)
            time.sleep(every)

    def end(self) -> None:
        """Wait for the end of the run."""
        self.check(self.process.wait(PATIENCE) == 0)

    def check(self, well: bool) -> None:
        """Raises AssertionError, with what the run has printed, if it isn't well or has ended."""
        if not well or self.process.poll() not in (None, 0):
            raise AssertionError(f"the run failed:\n{self.messages.read_text()[-6000:]}")


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    found = []
    with contextlib.suppress(OSError):
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def lines(out: Path) -> list[dict[str, Any]]:
    """The log of a run. Steps that were taken again are in it again."""
    log = out / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def unfinished(out: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(not (f / ".metadata").exists() for f in out.glob("checkpoint-*"))


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint."""
    return max((file.parent for file in out.glob("checkpoint-*/.metadata")), default=None)


def kill_ranks(out: Path, arguments: Sequence[str], steps: int, kills: int, seed: int) -> list[Any]:
    """Run to the end with ``kills`` kills; returns what each of them hit."""
    draw, moments = random.Random(seed), []
    with Job.on(2, out, arguments, restarts=kills) as job:
        for life in range(kills):
            moment = draw.choice(["start", "step", "save"]) if life < kills - 1 else "end"
            # The kills are spread over the steps.
            step = math.ceil(steps * (life + draw.random()) / kills)
            job.wait_for(lambda life=life: len(job.ranks(life)) == 2, every=0.05)
            if moment == "start":
                time.sleep(8 * draw.random())
            else:
                step = steps if moment == "end" else step
                seen = len(lines(out))
                job.wait_for(lambda seen=seen, step=step: _reached(lines(out)[seen:], step))
            if moment == "save":
                job.wait_for(lambda: unfinished(out) or _reached(lines(out), steps))
            time.sleep(draw.choice([0.001, 0.01, 0.1]) * draw.random())
            ranks = job.ranks(life)
            rank = draw.choice(sorted(ranks))
            left = unfinished(out)
            os.kill(ranks[rank], signal.SIGKILL)
            log, kept = lines(out), newest(out)
            moments.append({
                "moment": moment, "rank": rank, "unfinished_checkpoint": left,
                "steps_taken": log[-1]["step"] if log else 0,
                "steps_kept": int(kept.name.split("-")[1]) if kept else 0,
                "phase": log[-1]["phase"] if log else "sparse",
            })  # fmt: skip
            print(moments[-1], flush=True)
        job.end()
    return moments


def was_saving(moment: dict[str, Any]) -> bool:
    """Whether a kill hit a checkpoint. Another kill may have left the unfinished one before."""
    due = moment["steps_taken"] % SAVE_EVERY == 0 and moment["steps_taken"] > moment["steps_kept"]
    return bool(moment["unfinished_checkpoint"] and moment["moment"] != "start" and due)


def _reached(log: list[dict[str, Any]], step: int) -> bool:
    return bool(log) and log[-1]["step"] >= step


def run_whole(out: Path, arguments: Sequence[str]) -> None:
    """Run to the end on two ranks, without a kill."""
    with Job.on(2, out, arguments) as job:
        job.end()


def change_world(out: Path, arguments: Sequence[str], steps: int, worlds: Sequence[int]) -> None:
    """Run to the end, each part of the steps on another number of ranks."""
    for index, world in enumerate(worlds):
        with Job.on(world, out, arguments) as job:
            if index == len(worlds) - 1:
                job.end()
            else:
                until = (index + 1) * steps // len(worlds)
                job.wait_for(lambda until=until: _kept(out) >= until)


def _kept(out: Path) -> int:
    kept = newest(out)
    return int(kept.name.split("-")[1]) if kept else 0


def final_state(out: Path, steps: int) -> dict[str, Any]:
    """All that the last checkpoint holds: the tensors and the rest."""
    whole = out / "whole.pt"
    dcp_to_torch_save(out / f"checkpoint-{steps:06d}", whole)
    state: dict[str, Any] = torch.load(whole, weights_only=True)["training"]
    return {**state, "slope_fx": json.loads(state["slope_fx"])}


def leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists by their path."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        return {
            k: v for key, part in tree.items() for k, v in leaves(part, f"{name}/{key}").items()
        }
    return {name: tree}


def differing(one: Path, other: Path, steps: int) -> list[str]:
    """What two finished runs don't share bit for bit."""
    first, second = (leaves(final_state(out, steps)) for out in (one, other))
    found = [
        name for name in sorted(first.keys() | second.keys())
        if name not in first or name not in second or not _equal(first[name], second[name])
    ]  # fmt: skip
    want = {line["step"]: line for line in lines(one)}
    found += [f"loss of step {line['step']}" for line in lines(other) if line != want[line["step"]]]
    if {line["step"] for line in lines(other)} != set(range(1, steps + 1)):
        found.append("the steps in the log")
    files = ("model/model.safetensors", "sample.txt")
    return found + [f for f in files if (one / f).read_bytes() != (other / f).read_bytes()]


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def distance(one: Path, other: Path, steps: int) -> dict[str, float]:
    """How far the losses and the tensors of two finished runs are apart."""
    losses = [{line["step"]: line["loss"] for line in lines(out)} for out in (one, other)]
    assert losses[0].keys() == losses[1].keys() == set(range(1, steps + 1))
    first, second = (leaves(final_state(out, steps)["model"]) for out in (one, other))
    floating = [name for name, tensor in first.items() if tensor.is_floating_point()]
    masks = [name for name in first if name not in floating]
    return {
        "worst_loss": max(abs(losses[0][step] - losses[1][step]) for step in losses[0]),
        "worst_weight": max((first[n] - second[n]).abs().max().item() for n in floating),
        "bytes_of_masks_differing": sum(int((first[n] != second[n]).sum()) for n in masks),
    }


def write_text(folder: Path) -> list[str]:
    """A little English of our own, and the arguments that train on it."""
    sentence = "the quick brown fox jumps over a lazy dog while seven wizards brew potions"
    words = sentence.split()
    text = (" ".join(words[i % 13 :] + words[: (i * 5) % 13]) for i in range(400))
    (folder / "text.txt").write_text("\n\n".join(text))
    return ["--text-files", str(folder / "text.txt")]


def measure(folder: Path, steps: int, kills: int, seed: int) -> dict[str, Any]:
    """Make all runs; returns what happened.

    Raises:
        AssertionError: a run differs from the one without kills.
    """
    text = write_text(folder)
    arguments = [*TINY, *text, "--steps", str(steps), "--dropout", "0.1"]
    run_whole(folder / "whole", arguments)
    moments = kill_ranks(folder / "killed", arguments, steps, kills, seed)
    different = differing(folder / "whole", folder / "killed", steps)
    assert not different, f"after {kills} kills these differ: {different}"
    return {
        "ranks": 2, "kills": kills, "steps": steps, "seed": seed,
        "kills_while_saving": sum(map(was_saving, moments)),
        "kills_in_adapter_phase": sum(moment["phase"] == "adapter" for moment in moments),
        "moments": moments, "identical": True,
    }  # fmt: skip


def measure_worlds(folder: Path, steps: int, worlds: Sequence[int]) -> dict[str, Any]:
    """Stop a run and go on at other world sizes; returns how far it is from one on two ranks."""
    # Without dropout, of which each rank has its own.
    arguments = [*TINY, *write_text(folder), "--steps", str(steps)]
    run_whole(folder / "even", arguments)
    change_world(folder / "changed", arguments, steps, worlds)
    far = distance(folder / "even", folder / "changed", steps)
    ranks = {line["step"]: line["ranks"] for line in lines(folder / "changed")}
    assert set(ranks.values()) == set(worlds)
    assert far["worst_loss"] < 1e-3, far
    return {"ranks": list(worlds), "first_step_of_each": _firsts(ranks), "steps": steps, **far}


def _firsts(ranks: dict[int, int]) -> list[int]:
    return [step for step in sorted(ranks) if ranks.get(step - 1) != ranks[step]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="slope_fx_ranks_"))
    try:
        worlds = measure_worlds(folder, args.steps, [2, 1, 3])
        print(worlds, flush=True)
        result = measure(folder, args.steps, args.kills, args.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    about = {"date": datetime.date.today().isoformat(), "commit": commit()}
    result = {**about, "torch": str(torch.__version__), **result, "other_world_sizes": worlds}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{args.kills} kills of a rank: all is the uninterrupted run's, bit for bit.")


if __name__ == "__main__":
    main()
