"""Checkpoints of a training run: the weights in safetensors, the rest beside them.

``OUT/checkpoint-000200/`` holds ``model.safetensors``, the tokenizer, the model's
configuration and ``training.pt`` (optimizer, schedules, random state, log). A
checkpoint is written under another name and renamed, so one that has its name is whole.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedTokenizerFast

PREFIX = "checkpoint-"


def latest(out: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return max(out.glob(f"{PREFIX}[0-9]*"), default=None)


def save(
    out: Path,
    step: int,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    state: dict[str, Any],
) -> Path:
    """Write the checkpoint of ``step`` and delete older ones; returns its folder."""
    final, partial = out / f"{PREFIX}{step:06d}", out / f"partial-{PREFIX}{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, str(partial / "model.safetensors"), metadata={"format": "pt"})
    model.config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    torch.save(state, partial / "training.pt")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in out.glob(f"{PREFIX}[0-9]*"):
        if old != final:
            shutil.rmtree(old)
    return final


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint."""
    return PreTrainedTokenizerFast.from_pretrained(checkpoint)


def load(checkpoint: Path, model: nn.Module) -> dict[str, Any]:
    """Load the weights into ``model``; returns the rest of the state."""
    load_model(model, str(checkpoint / "model.safetensors"))
    state: dict[str, Any] = torch.load(
        checkpoint / "training.pt", weights_only=True, map_location="cpu"
    )
    return state
