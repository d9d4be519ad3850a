"""Checkpoints of a training run, ``OUT/checkpoint-000200``, of which the newest is kept.

A sparse model's is slope_fx's own. The dense baseline's holds transformers' files and
``training.pt``; it is written under another name and renamed, so one that has its name is whole.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedTokenizerFast

import slope_fx

CHECKPOINTS = f"checkpoint-{'[0-9]' * 6}"
KEPT = ("arguments.json", "rows.json")
"""Files that tell the folder of a run from any other."""


def latest(out: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return max(out.glob(CHECKPOINTS), default=None)


def latest_of_ranks(out: Path) -> Path | None:
    """The newest checkpoint that was written by ``torch.distributed.checkpoint``, or None.

    Its metadata are written last, so a folder that has them is whole.
    """
    return max((file.parent for file in out.glob(f"{CHECKPOINTS}/.metadata")), default=None)


def delete_all_but(kept: Path, out: Path) -> None:
    """Delete the other checkpoints, whole or not."""
    for folder in out.glob(CHECKPOINTS):
        if folder != kept:
            shutil.rmtree(folder)


def delete_run(out: Path) -> None:
    """Delete the files of an earlier run, and no others."""
    for path in out.glob("*"):
        if path.match(CHECKPOINTS) or path.match(f"partial-{CHECKPOINTS}"):
            shutil.rmtree(path)
        elif path.name in (*KEPT, "log.json", "loss.png", "sample.txt"):
            path.unlink()


def check_folder(out: Path) -> None:
    """Check that a folder is empty or of a run: a run deletes its old checkpoints."""
    if any(out.iterdir()) and not any((out / name).exists() for name in KEPT):
        raise SystemExit(
            f"{out} holds other files than those of a run, such as {min(out.iterdir()).name}: "
            "give a new folder (--out)."
        )


def write_arguments(out: Path, mine: dict[str, Any], of: str = "arguments") -> None:
    """Write the arguments of a new run, or of its rows, as ``OUT/arguments.json``."""
    partial = out / f"{of}.partial"
    partial.write_text(json.dumps(mine))
    partial.rename(out / f"{of}.json")


def keep_arguments(
    out: Path, mine: dict[str, Any], free: Collection[str] = (), of: str = "arguments"
) -> None:
    """Write the arguments of a new run, or check that a run goes on with those that it had.

    Args:
        out: folder of the run.
        mine: the arguments.
        free: names of those that may differ.
        of: what they are of; the name of the file.
    """
    file = out / f"{of}.json"
    if not file.exists():
        write_arguments(out, mine, of)
    saved = json.loads(file.read_text())
    for name, value in mine.items():
        if name not in free and saved.get(name) != value:
            option = f"--{name.replace('_', '-')}"
            raise SystemExit(
                f"{out}: its {of} have {option} {saved.get(name)}, not {value}. Give the "
                "same, or another --out."
            )


def save(
    out: Path,
    step: int,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    parts: dict[str, Any],
    *,
    dense: bool,
) -> Path:
    """Write the checkpoint of ``step`` and delete older ones; returns its folder.

    ``parts`` are the optimizer and the like, and plain data, by name.
    """
    final = out / f"checkpoint-{step:06d}"
    if dense:
        _save_dense(final, model, tokenizer, parts)
    else:
        slope_fx.save_pretrained(model, final, tokenizer=tokenizer, training=parts)
    delete_all_but(final, out)
    return final


def load_training(checkpoint: Path, parts: dict[str, Any]) -> dict[str, Any]:
    """Load the state of ``parts``, those that aren't plain data; returns the plain data."""
    if not (checkpoint / "training.pt").exists():
        return slope_fx.load_training(checkpoint, parts)
    state: dict[str, Any] = torch.load(
        checkpoint / "training.pt", weights_only=True, map_location="cpu"
    )
    torch.set_rng_state(state.pop("random"))
    for name, part in parts.items():
        part.load_state_dict(state.pop(name))
    return state


def load_dense(checkpoint: Path, model: nn.Module) -> None:
    """Load the weights of the dense baseline."""
    load_model(model, str(checkpoint / "model.safetensors"))


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint."""
    return PreTrainedTokenizerFast.from_pretrained(checkpoint)


def _save_dense(
    final: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast, parts: dict[str, Any]
) -> None:
    partial = final.with_name(f"partial-{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    states = {n: p.state_dict() if hasattr(p, "state_dict") else p for n, p in parts.items()}
    torch.save({**states, "random": torch.get_rng_state()}, partial / "training.pt")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
