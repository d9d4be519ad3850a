"""One answer on every road: each architecture, however it is compiled, saved or exported.

A small random model goes every road that slope_fx offers (Inductor by blocks and as a whole, other
backends and engines, a reloaded checkpoint, merged and PEFT adapters), in both phases, in fp32, in
bf16 and under autocast; ``consistency_checks.py`` says what is compared with the formulas in
float64.

    python tests/helpers/consistency.py --write benchmarks/results/consistency.json
"""

import argparse
import copy
import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import slope_fx
from architectures import cast, made, plain_experts
from consistency_checks import (
    CASES,
    Errors,
    NothingToCompareError,
    batches_of,
    compare,
    plain_gradient_errors,
    run,
    worst,
)
from consistency_subject import PHASES, Subject
from slope_fx.record import record_of

BOUND = 3e-5
"""In fp32: an error relative to the largest number of what is compared."""
STEPPED = 3e-4
"""The same of how far weights moved in two steps of AdamW, which divides by small gradients."""
SLACK, FLOOR = 8.0, 2.0**-7
"""In bf16, how many times the error of a plain dense model in bf16 is allowed, and the least
that is: for a single number, a loss, can be exact by chance."""


@dataclass
class Cell:
    """One comparison.

    Attributes:
        architecture, phase, road, dtype, case: what was compared.
        errors: the largest error of each check, relative to the largest number there.
        where: the parameter with the worst gradient.
        bounds: what is allowed of each.
        outcome: "" for a comparison; else why there is none: "refused: ...", "none: ...", or
            "failed: ..." with the error.
    """

    architecture: str
    phase: str
    road: str
    dtype: str
    case: str
    errors: Errors = field(default_factory=dict)
    where: str = ""
    bounds: Errors = field(default_factory=dict)
    outcome: str = ""
    seconds: float = 0.0

    @property
    def wrong(self) -> str:
        """What is wrong with it, or ""."""
        if self.outcome:
            return self.outcome if self.outcome.startswith("failed") else ""
        over = {k: e for k, e in self.errors.items() if not e <= self.bounds[k]}
        return f"{over} of at most {self.bounds} ({self.where})" if over else ""


# Roads: a subject in, a model out.


def inductor(subject: Subject, **how: Any) -> nn.Module:
    """By blocks: as "auto" finds them, if it does."""
    model = subject.compiled(**how)
    if not record_of(model).regions.whole:
        return model
    return subject.compiled(region="blocks", **how)


def reloaded(subject: Subject) -> nn.Module:
    """From a checkpoint of the model, through Inductor."""
    of_transformers = hasattr(subject.dense, "loss_type")
    fresh = None if of_transformers else made(subject.architecture).to(subject.kept)
    with tempfile.TemporaryDirectory() as folder:
        slope_fx.save_pretrained(inductor(subject), folder)
        return slope_fx.load_pretrained(folder, fresh, on_fallback="error")


def to_peft(subject: Subject) -> nn.Module:
    """A PEFT model's own base, in which the adapters are.

    Raises:
        NothingToCompareError: a layer is none that PEFT takes, and the export was refused.
    """
    model = subject.compiled(backend=None)
    paths = slope_fx.sparse_weights(model)
    modules = dict(model.named_modules())
    try:
        return slope_fx.densify(model, "peft").get_base_model()
    except slope_fx.errors.UnsupportedError as error:
        linear = all(isinstance(modules.get(path), (nn.Linear, Conv1D)) for path in paths)
        if linear and "[PEFT:" not in str(error):  # which quotes PEFT's own refusal
            raise
        raise NothingToCompareError(f"refused: {error}") from None


ROADS: dict[str, Callable[[Subject], nn.Module]] = {
    "inductor, blocks": inductor,
    "inductor, model": lambda s: s.compiled(region="model"),
    "aot_eager": lambda s: s.compiled(backend="aot_eager"),
    "eager": lambda s: s.compiled(backend="eager"),
    "cpu-dense": lambda s: s.compiled(backend="aot_eager", engine="cpu-dense"),
    "dense": lambda s: s.compiled(backend="aot_eager", engine="dense"),
    "reference": lambda s: s.compiled(backend="aot_eager", engine="reference"),
    "reloaded": reloaded,
    "merged": lambda s: slope_fx.densify(s.compiled(backend=None)),
    "PEFT": to_peft,
}

PLAN: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("eager", "fp32", ("masks", "train", "eval", "one token")),
    (
        "inductor, blocks",
        "fp32",
        ("train", "eval", "one token", "accumulation", "checkpoint around, reentrant",
         "checkpoint around, non-reentrant", "steps"),
    ),
    (
        "inductor, model",
        "fp32",
        ("train", "eval", "checkpoint, reentrant", "checkpoint, non-reentrant"),
    ),
    ("reloaded", "fp32", ("train", "eval")),
    ("aot_eager", "fp32", ("train", "eval", "accumulation", "steps")),
    ("cpu-dense", "fp32", ("train",)),
    ("dense", "fp32", ("train",)),
    ("reference", "fp32", ("train",)),
    ("merged", "fp32", ("train", "eval")),
    ("PEFT", "fp32", ("eval",)),
    ("inductor, blocks", "bf16", ("train", "eval")),
    ("reloaded", "bf16", ("train",)),
    ("aot_eager", "bf16", ("train",)),
    ("merged", "bf16", ("eval",)),
    ("inductor, blocks", "autocast", ("train",)),
    ("aot_eager", "autocast", ("train",)),
)  # fmt: skip
"""Road, dtype, cases."""

CHOSEN = (
    "GPT-2", "OPT", "GPT-NeoX", "Llama", "Qwen3", "Phi", "Mixtral", "GraniteMoe", "Mamba", "BERT",
    "T5", "ViT", "torch: TransformerEncoder", "torch: weights of its own",
    "diffusers: Transformer2D",
)  # fmt: skip


def baseline(subject: Subject, case: str) -> Errors:
    """The errors of the same model, merged, plain and dense: what rounding does to any."""
    plain = slope_fx.densify(subject.source)
    twin = plain_experts(copy.deepcopy(plain)).double()
    grad, batches = case != "eval", batches_of(subject, case)
    wide = [cast(inputs, torch.float64) for inputs in batches]
    got = run(plain.train(grad), batches, grad, subject.autocast)
    errors = compare(got, run(twin.train(grad), wide, grad))
    if grad:
        own = dict(twin.named_parameters())
        errors["gradients"], _ = worst(plain_gradient_errors(plain, own, subject.rough))
    return errors


NOT_OURS = (
    ("Mamba", "", "view size is not compatible",
     "aot_eager runs a graph as it was traced, and PyTorch's softplus_backward has other strides "
     "when it is traced"),
    *((name, "bf16", "CppCompileError",
       "the plain dense model doesn't go through PyTorch's Inductor in bf16 either")
      for name in ("GPT-NeoX", "Phi")),
    ("T5", "fp32, checkpoint, ", "ExpandedWeightError",
     "T5 sets requires_grad of a tensor where it checkpoints, at which Dynamo breaks the graph; "
     "slope_fx tells of the layer that would run dense (by blocks it doesn't)"),
)  # fmt: skip
"""Architecture, how dtype and case begin, what the error says, and why nothing can be compared:
the fault is not slope_fx's."""


def failure(cell: Cell, error: Exception) -> str:
    """The outcome of a comparison that raised."""
    inner = getattr(error, "inner_exception", error)
    said = f"{type(inner).__name__}: {(str(inner).strip().splitlines() or [''])[0]}"
    for architecture, where, text, reason in NOT_OURS:
        here = cell.architecture == architecture and f"{cell.dtype}, {cell.case}".startswith(where)
        if here and text in said:
            return f"none: {reason}"
    return f"failed: {said[:200]}"


def bounds_of(subject: Subject, case: str, errors: Errors) -> Errors:
    """What is allowed of each error."""
    if subject.dtype == "fp32":
        return {
            check: STEPPED if (case, check) == ("steps", "weights") else BOUND for check in errors
        }
    plain = baseline(subject, case)
    return {check: max(SLACK * plain[check], FLOOR) for check in errors}


def cells(
    architecture: str, phase: str, dtype: str, road: str, cases: tuple[str, ...], **how: Any
) -> Iterator[Cell]:
    """The comparisons of one model on one road."""
    torch._dynamo.reset()
    subject = Subject(architecture, phase, dtype)
    model: nn.Module | None = None
    for case in cases:
        cell = Cell(architecture, phase, road, dtype, case)
        started = time.perf_counter()
        try:
            model = ROADS[road](subject, **how) if model is None else model
            found = CASES[case](subject, model, case)
            cell.errors, cell.where = found.errors, found.where
            cell.bounds = bounds_of(subject, case, found.errors)
        except NothingToCompareError as nothing:
            cell.outcome = str(nothing)
        except Exception as error:
            cell.outcome = failure(cell, error)
        cell.seconds = time.perf_counter() - started
        yield cell


def all_cells(architecture: str) -> Iterator[Cell]:
    for phase in PHASES:
        for road, dtype, cases in PLAN:
            if phase == "adapter" or road != "PEFT":
                yield from cells(architecture, phase, dtype, road, cases)


# The whole matrix, one process an architecture, as many at once as there are cores.

ROOT = Path(__file__).resolve().parents[2]


HELPERS = (
    "consistency", "consistency_checks", "consistency_subject", "formulas", "architectures",
)  # fmt: skip


def digest(helpers: tuple[str, ...] = HELPERS) -> str:
    """Of all sources, so that what was compared before them isn't taken for compared now."""
    folders = ("slope_fx", "passes", "ops", "kernels")
    sources = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    mine = [Path(__file__).parent / f"{name}.py" for name in helpers]
    return hashlib.sha256(b"".join(p.read_bytes() for p in [*sources, *mine])).hexdigest()[:16]


def one(architecture: str, path: Path) -> None:
    """Compare one architecture, and write its cells."""
    found = []
    for cell in all_cells(architecture):
        found.append(asdict(cell))
        said = cell.wrong or cell.outcome or f"{max(cell.errors.values()):.0e}"
        where = f"{architecture:24} {cell.phase:8} {cell.road:17} {cell.dtype:8} {cell.case:32}"
        print(
            f"  {where} {cell.seconds:5.1f} s  {'WRONG ' if cell.wrong else ''}{said}", flush=True
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))


def main() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import common

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the file to write the results to")
    parser.add_argument("--only", nargs="*", default=CHOSEN, metavar="NAME")
    parser.add_argument("--again", action="store_true", help="also what was compared already")
    parser.add_argument("--cells", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cells:
        torch.set_num_threads(1)
        return one(args.only[0], args.cells)
    same = digest()
    environment = {
        **os.environ, "SLOPE_FX_ENGINES": "cpu", "OMP_NUM_THREADS": "1",
        "SLOPE_FX_CACHE_DIR": str(ROOT / "build" / "cache"),
    }  # fmt: skip

    def compared(name: str) -> list[dict[str, Any]]:
        """The cells of an architecture, from a process of its own."""
        slug = "".join(c if c.isalnum() else "_" for c in name)
        part = ROOT / "build" / "consistency" / f"{slug}-{same}.json"
        if args.again or not part.exists():
            command = [sys.executable, __file__, "--only", name, "--cells", str(part)]
            subprocess.run(command, env=environment, check=True)
        else:
            print(name, "(compared before)", flush=True)
        cells: list[dict[str, Any]] = json.loads(part.read_text())
        return cells

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        found = [cell for cells in pool.map(compared, args.only) for cell in cells]
    wrong = [cell for cell in (Cell(**c) for c in found) if cell.wrong]
    for cell in wrong:
        print(f"WRONG: {cell.architecture}, {cell.phase}, {cell.road}, {cell.dtype}, {cell.case}: "
              f"{cell.wrong}")  # fmt: skip
    print(f"{len(found)} comparisons, {len(wrong)} wrong, {sum(c['seconds'] for c in found):.0f} s")
    if args.write:
        head = {
            "date": datetime.date.today().isoformat(),
            "commit": common.commit(),
            "device": common.processor(),
            "threads": 1,
            "versions": versions(),
        }
        lines = ",\n".join(json.dumps(cell) for cell in found)
        args.write.write_text(f'{json.dumps(head)[:-1]}, "cells": [\n{lines}\n]}}\n')
    sys.exit(bool(wrong))


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "diffusers", "peft")
    return {**{name: version(name) for name in names}, "slope_fx": slope_fx.__version__}


if __name__ == "__main__":
    main()
