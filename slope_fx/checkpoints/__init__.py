"""Checkpoints: sparse weights in safetensors, all else in JSON, written whole or not at all.

``files.py`` writes a folder atomically and checks one, ``manifest.py`` is the JSON that says what
a checkpoint holds, ``saving.py`` and ``loading.py`` go between it and a model, ``training.py``
keeps optimizers and the like, ``verify.py`` reads all of a checkpoint and tells what is wrong.
"""

from slope_fx.checkpoints.loading import load_pretrained
from slope_fx.checkpoints.manifest import FORMAT_VERSION, Manifest, read_manifest
from slope_fx.checkpoints.saving import describe_checkpoint, save_pretrained
from slope_fx.checkpoints.training import load_training
from slope_fx.checkpoints.verify import CheckpointReport, verify

__all__ = [
    "FORMAT_VERSION",
    "CheckpointReport",
    "Manifest",
    "describe_checkpoint",
    "load_pretrained",
    "load_training",
    "read_manifest",
    "save_pretrained",
    "verify",
]
