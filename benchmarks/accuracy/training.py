"""One run of the accuracy study: train an arm on a rung, at a learning rate, with a seed."""

import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, RUNGS, cost, make, own_rates, set_backward, trunk_of
from data import rows
from torch import nn
from tqdm import tqdm

import slope_fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import commit, processor

CACHE = Path(__file__).resolve().parents[2] / "build" / "accuracy"
CONTEXT, HELD_OUT_ROWS, EVALUATIONS = 256, 2048, 10


@dataclass
class Trained:
    """What a run trains, and how far it is.

    Attributes:
        curve: (step, held-out loss) during the run.
        seconds: of all steps, those of the trunk among them. On a CPU, those of the processor: a
            run is one thread, and others may share the machine.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int = 0
    curve: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parameters and the buffers by name."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def save(self, path: Path) -> None:
        """Leave the state for the arms that begin here."""
        path.parent.mkdir(parents=True, exist_ok=True)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        moments = {names[p]: state for p, state in self.optimizer.state.items()}
        tensors = {name: tensor.data for name, tensor in self.tensors().items()}
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(
            {"tensors": tensors, "moments": moments, "steps": self.steps, "curve": self.curve,
             "seconds": self.seconds}, partial,
        )  # fmt: skip
        partial.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Begin where the trunk was. The adapters are what this arm does not share with it."""
        saved = torch.load(path)
        mine = self.tensors()
        own = {name for name in mine if name not in saved["tensors"]}
        if not saved["tensors"].keys() <= mine.keys() or not all("lora_" in name for name in own):
            raise SystemExit(f"{path.name} is of another model.")
        for name, tensor in saved["tensors"].items():
            mine[name].copy_(tensor)
        for name, moments in saved["moments"].items():
            self.optimizer.state[mine[name]] = moments
        for weight in slope_fx.sparse_weights(self.model).values():
            weight.note_write()
        self.steps, self.curve = saved["steps"], saved["curve"]
        self.seconds = saved["seconds"]


def forks(arm: str, rung: str, rate: float, seed: int, steps: int) -> dict[int, Path]:
    """The steps after which arms part from this one, and where its state goes."""
    shared = (trunk_of(other) for other in ARMS)
    folder = CACHE / "forks" / f"{arm}-{rung}-{rate:g}-{seed}"
    parted = {int(fork[1] * steps) - 1 for fork in shared if fork is not None and fork[0] == arm}
    return {step: folder / f"{step}.pt" for step in parted}


def run(arm: str, rung: str, rate: float, seed: int, device: str) -> dict[str, Any]:
    """Train one model. The loss is that of the end."""
    size = RUNGS[rung]
    steps = size.tokens // (CONTEXT * size.batch)
    text = rows(CACHE, CONTEXT)
    torch.manual_seed(seed)
    model, schedule = make(ARMS[arm], size, CONTEXT, steps)
    model.to(device).train()
    order = torch.randperm(len(text["train"]), generator=torch.Generator().manual_seed(seed))
    if steps * size.batch > len(order):
        raise SystemExit(f"{rung} needs {steps * size.batch} rows; the text has {len(order)}.")
    groups = slope_fx.param_groups(
        model, rate, weight_decay=0.1, **own_rates(ARMS[arm], rate, steps)
    )
    trained = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    warmup = max(1, steps // 50)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    half: Any = contextlib.nullcontext()
    if device != "cpu":
        half = torch.autocast(device, torch.bfloat16)
    state = Trained(model, optimizer)
    leave = forks(arm, rung, rate, seed, steps)
    fork = trunk_of(arm)
    if fork is not None:
        begin = forks(fork[0], rung, rate, seed, steps)[int(fork[1] * steps) - 1]
        if begin.exists():
            state.load(begin)
            schedule.load_state_dict({**schedule.state_dict(), "last_step": state.steps})
            rates.last_epoch = state.steps - 1
            rates.step()
    forked = state.steps
    clock = time.process_time if device == "cpu" else time.perf_counter
    for step in tqdm(range(forked, steps), mininterval=5):
        started = clock()
        set_backward(ARMS[arm], model, step, steps)
        ids = text["train"][order[step * size.batch : (step + 1) * size.batch]].long().to(device)
        with half:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if schedule is not None:
            schedule.step()
        state.seconds += clock() - started
        state.steps = step + 1
        if not loss.isfinite():
            break
        if state.steps % max(1, steps // EVALUATIONS) == 0 and state.steps < steps:
            found = evaluate(model, text["held_out"][:256], device)
            state.curve.append([state.steps, found])
        if state.steps in leave:
            state.save(leave[state.steps])
    final = evaluate(model, text["held_out"][:HELD_OUT_ROWS], device)
    return {
        "arm": arm, "rung": rung, "lr": rate, "seed": seed, "steps": steps,
        "tokens": steps * size.batch * CONTEXT,
        "loss": final if math.isfinite(final) else math.inf, "curve": state.curve,
        "cost": cost(ARMS[arm], size), "seconds": state.seconds, "forked_at": forked,
        "parameters": sum(p.numel() for p in trained), "commit": commit(),
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "versions": {"torch": str(torch.__version__), "slope_fx": slope_fx.__version__},
    }  # fmt: skip


@torch.no_grad()
def evaluate(model: nn.Module, held_out: torch.Tensor, device: str) -> float:
    """The mean loss in nats a byte."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        losses = [
            model(input_ids=ids, labels=ids, use_cache=False).loss.item()
            for ids in (part.long().to(device) for part in held_out.split(64))
        ]
    model.train()
    return sum(losses) / len(losses)
