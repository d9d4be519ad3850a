"""Reads all of a checkpoint and tells what is wrong with it."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slope_fx.checkpoints.loading import check_names, read_layers
from slope_fx.checkpoints.manifest import check_files, read_manifest
from slope_fx.planning.plan import sparse_plans


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`verify` found in a checkpoint that is whole.

    Attributes:
        path: the folder.
        version: of slope_fx, that wrote it.
        model_class: of the model.
        patterns: N:M to how many layers have it.
        dense: linears that are dense.
        adapters: layers with an adapter, and whether adapters take part.
        adapters_active: the same for those that take part.
        tensors: how many there are.
        bytes: of all files.
        files: how many.
        training: whether it has a run's training state.
    """

    path: str
    version: str
    model_class: str
    patterns: dict[str, int]
    dense: int
    adapters: int
    adapters_active: int
    tensors: int
    bytes: int
    files: int
    training: bool

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, fit for JSON."""
        return asdict(self)


def verify(path: str | os.PathLike[str]) -> CheckpointReport:
    """Check every file's hash, every tensor's shape and every mask of a checkpoint.

    No model is made, and no code but slope_fx's is needed.

    Raises:
        CheckpointError: the first thing that is wrong.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest, hashes=True)
    check_names(folder, manifest)
    read_layers(folder, manifest)
    patterns: dict[str, int] = {}
    for plan in sparse_plans(manifest.plans):
        patterns[str(plan.pattern)] = patterns.get(str(plan.pattern), 0) + 1
    entries = manifest.sparse.values()
    return CheckpointReport(
        path=str(folder),
        version=manifest.version,
        model_class=manifest.model_class,
        patterns=patterns,
        dense=len(manifest.plans) - len(manifest.sparse),
        adapters=sum(entry.rank is not None for entry in entries),
        adapters_active=sum(entry.adapter_active for entry in entries),
        tensors=len(manifest.tensors),
        bytes=sum(size for size, _ in manifest.files.values()),
        files=len(manifest.files),
        training="training.json" in manifest.files,
    )
