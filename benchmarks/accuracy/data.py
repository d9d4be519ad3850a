"""The text of the study, the sources of pinned packages as rows of bytes. See PROTOCOL.md."""

import hashlib
import importlib.util
from pathlib import Path

import numpy
import torch

PACKAGES = ("torch", "transformers", "numpy")
HELD_OUT = 8
"""Files whose digest begins with a smaller byte are held out."""


def rows(cache: Path, length: int = 256) -> dict[str, torch.Tensor]:
    """ "train" and "held_out": uint8 (rows, length). Kept in a folder."""
    found = {}
    for part in ("train", "held_out"):
        path = cache / f"{part}-{'-'.join(PACKAGES)}.npy"
        if not path.exists():
            _write(cache)
        data = numpy.load(path, mmap_mode="r")
        whole = len(data) // length * length
        found[part] = torch.from_numpy(numpy.array(data[:whole])).view(-1, length)
    return found


def _write(cache: Path) -> None:
    files = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        for path in root.rglob("*.py"):
            name = f"{package}/{path.relative_to(root).as_posix()}"
            files.append((hashlib.sha256(name.encode()).digest(), path))
    files.sort()
    parts: dict[str, list[bytes]] = {"train": [], "held_out": []}
    for digest, path in files:
        parts["held_out" if digest[0] < HELD_OUT else "train"].append(path.read_bytes() + b"\0")
    cache.mkdir(parents=True, exist_ok=True)
    for part, texts in parts.items():
        path = cache / f"{part}-{'-'.join(PACKAGES)}.npy"
        partial = path.with_name(f"partial-{path.name}")
        numpy.save(partial, numpy.frombuffer(b"".join(texts), dtype=numpy.uint8))
        partial.replace(path)
