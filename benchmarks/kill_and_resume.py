"""A run that is killed again and again, at random moments, against one that is not.

Each life of the run is a process that goes on from the last checkpoint, which it writes after
every step, until it gets a SIGKILL: while it loads, compiles, computes or writes. In the end its
weights, optimizer state and losses must be those of a run that was never killed, bit for bit.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import slope_fx

# Only the run of all thirty is a result; run as a script it has a folder to write to.
RESULTS = Path(__file__).resolve().parent / "results" / "kill_and_resume.json"
VOCABULARY = 64


ENDED = "ended"


def make_model() -> torch.nn.Module:
    """Small, with dropout, so that the random state has to be right too."""
    torch.manual_seed(0)
    random.seed(0)  # multiprocessing seeds each child anew; it's kept in checkpoints too
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=VOCABULARY, n_positions=32, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def live(folder: Path, steps: int, progress: Connection | None, method: Any) -> None:
    """Train to the end, from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    begun = folder.is_dir()
    if begun:
        model = slope_fx.load_pretrained(folder, backend="eager", on_fallback="error").train()
    else:
        model = slope_fx.compile(
            make_model(),
            "2:4",
            adapter_rank=4,
            backend="eager",
            on_fallback="error",
            method=method,
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    schedule = slope_fx.Schedule(model, steps, adapter_start=0.5, backward_mask_interval=7)
    parts = {"optimizer": optimizer, "rates": rates, "schedule": schedule}
    losses: list[float] = []
    if begun:
        losses = slope_fx.load_training(folder, parts)["losses"]
    for step in range(schedule.last_step, steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, VOCABULARY, (2, 16), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        schedule.step()
        losses.append(loss.item())
        if progress:
            progress.send("computed")
        slope_fx.save_pretrained(model, folder, training={**parts, "losses": losses})
        if progress:
            progress.send("written")
    if progress:
        progress.send(ENDED)
        progress.poll(None)  # to be killed: the last kill may come late on a busy machine


def kill_and_resume(
    folder: Path, steps: int, kills: int, seed: int, method: Any = "slope"
) -> dict[str, Any]:
    """Kill a run ``kills`` times and let it end; returns what happened.

    Raises:
        AssertionError: it differs from a run that was not killed.
    """
    draw = random.Random(seed)
    processes = multiprocessing.get_context("fork")
    whole, parts = folder / "whole", folder / "parts"
    alone = processes.Process(target=live, args=(whole, steps, None, method))
    alone.start()
    alone.join()
    assert alone.exitcode == 0
    moments = []
    for _ in range(kills):
        mine, theirs = processes.Pipe()
        life = processes.Process(target=live, args=(parts, steps, theirs, method))
        life.start()
        theirs.close()
        # Some steps into its life, at any point of what it does then.
        for _ in range(draw.randint(0, max(1, 3 * steps // (2 * kills)))):
            if mine.recv() == ENDED:
                break
        time.sleep(draw.choice([0.001, 0.01, 0.05, 0.5]) * draw.random())
        assert life.is_alive(), "the run failed before it was killed"
        assert life.pid is not None
        os.kill(life.pid, signal.SIGKILL)
        life.join()
        heard = "starting"
        while mine.poll():
            try:
                heard = mine.recv()
            except EOFError:
                break
        done, phase = _progress(parts)
        moments.append({"after": heard, "steps_kept": done, "phase": phase})
        print(f"killed after {done} steps, {phase} phase", flush=True)
    last = processes.Process(target=live, args=(parts, steps, None, method))
    last.start()
    last.join()
    assert last.exitcode == 0
    differing = _differences(whole, parts)
    assert not differing, f"after {kills} kills these differ: {differing}"
    phases = [moment["phase"] for moment in moments]
    return {
        "kills": kills, "steps": steps, "seed": seed,
        "kills_in_sparse_phase": phases.count("sparse"),
        "kills_in_adapter_phase": phases.count("adapter"),
        "moments": moments, "identical": True,
    }  # fmt: skip


def _progress(folder: Path) -> tuple[int, str]:
    """Steps and phase of the last checkpoint, which must be whole after every kill."""
    if not folder.is_dir():
        return 0, "sparse"
    report = slope_fx.checkpoints.verify(folder)
    tree = json.loads((folder / "training.json").read_text())
    steps = dict(tree["parts"]["schedule"]["trees"][0]["items"])["last_step"]
    return steps, "adapter" if report.adapters_active else "sparse"


def _differences(one: Path, other: Path) -> list[str]:
    """Names of tensors, and files of numbers, that two checkpoints don't share bit for bit."""
    found = []
    for file in ("model.safetensors", "training.safetensors"):
        first, second = load_file(one / file), load_file(other / file)
        names = first.keys() | second.keys()
        found += [
            n for n in sorted(names)
            if n not in first or n not in second or not torch.equal(first[n], second[n])
        ]  # fmt: skip
    trees = [json.loads((folder / "training.json").read_text()) for folder in (one, other)]
    return found + (["training.json"] if trees[0] != trees[1] else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=90, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="slope_fx_kills_"))
    try:
        result = kill_and_resume(folder, args.steps, args.kills, args.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    args.out.write_text(json.dumps({"torch": str(torch.__version__), **result}, indent=1) + "\n")
    print(
        f"{args.kills} kills, {result['kills_in_adapter_phase']} of them in the adapter phase: "
        "the weights, the optimizer's state and the losses are the uninterrupted run's."
    )


if __name__ == "__main__":
    main()
