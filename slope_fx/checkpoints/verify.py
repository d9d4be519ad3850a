"""Check all files of a checkpoint."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slope_fx.checkpoints.layers import check_names, read_layers
from slope_fx.checkpoints.manifest import check_files, read_manifest
from slope_fx.planning.plan import sparse_plans


@dataclass(frozen=True)
class CheckpointReport:
    """The content of a valid checkpoint, as :func:`verify` found it.

    Attributes:
        path: folder of the checkpoint.
        version: version of slope_fx that wrote the checkpoint.
        model_class: class name of the model.
        patterns: N:M pattern -> number of layers with it.
        dense: number of dense linears.
        adapters: number of layers with an adapter.
        adapters_active: number of layers with an active adapter.
        tensors: number of tensors.
        bytes: total size of the files in bytes.
        files: number of files.
        training: whether the checkpoint has a training state.
        frozen: the format of the values of a frozen model, such as "float"; None for a model that
            trains.
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
    frozen: str | None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return asdict(self)


def verify(path: str | os.PathLike[str]) -> CheckpointReport:
    """Check the hashes of all files, the shapes of all tensors and all masks of a checkpoint.

    The model is not built, so the code of the model is not needed.

    Raises:
        CheckpointError: a check fails. The message gives the first problem.
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
        frozen=None if manifest.inference is None else manifest.inference.values,
    )
