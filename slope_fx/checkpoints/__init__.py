"""Checkpoints: tensors in safetensors files, everything else in JSON, written atomically.

- ``files.py`` writes a folder atomically and hashes files.
- ``manifest.py`` reads and writes ``slope_fx.json``, which describes a checkpoint.
- ``saving.py`` writes a model to a checkpoint, and ``loading.py`` makes a model from one.
- ``dense.py`` loads the weights of a dense model into a compiled one.
- ``training.py`` stores optimizers, schedules and random states.
- ``dcp.py`` has the state of a run for ``torch.distributed.checkpoint``.
- ``verify.py`` checks all files of a checkpoint.
"""

from slope_fx.checkpoints.dcp import TrainingState
from slope_fx.checkpoints.dense import load_dense
from slope_fx.checkpoints.loading import load_pretrained
from slope_fx.checkpoints.manifest import FORMAT_VERSION, Manifest, read_manifest
from slope_fx.checkpoints.saving import describe_checkpoint, save_pretrained
from slope_fx.checkpoints.training import load_training
from slope_fx.checkpoints.verify import CheckpointReport, verify

__all__ = [
    "FORMAT_VERSION",
    "CheckpointReport",
    "Manifest",
    "TrainingState",
    "describe_checkpoint",
    "load_dense",
    "load_pretrained",
    "load_training",
    "read_manifest",
    "save_pretrained",
    "verify",
]
