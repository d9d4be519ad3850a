"""The cache directory of compiled kernels and measured choices, and names for what is in it.

Nothing is loaded from a directory that another user can write to.
"""

import functools
import hashlib
import os
import platform
from pathlib import Path


class CacheError(RuntimeError):
    """The cache directory cannot be used. The message gives the reason."""


def cache_directory() -> Path:
    """The directory of compiled kernels and measured choices. It is created if necessary.

    It is ``SLOPE_FX_CACHE_DIR``, or ``slope_fx`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        CacheError: the directory cannot be created, or another user can write to it.
    """
    named = os.environ.get("SLOPE_FX_CACHE_DIR")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    path = (Path(named) if named else base / "slope_fx").expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(path)
    except OSError as error:
        raise CacheError(f"the cache directory {path} cannot be used: {error}") from None
    return path


def check_private(path: Path) -> None:
    """Check that only the user can write to ``path``.

    Raises:
        CacheError: another user can.
    """
    if not hasattr(os, "getuid"):
        return
    found = path.stat()
    if found.st_uid != os.getuid():
        raise CacheError(f"{path} belongs to another user; set SLOPE_FX_CACHE_DIR")
    if found.st_mode & 0o022:
        raise CacheError(f"other users can write to {path} (run chmod go-w on it)")


@functools.cache
def cpu_identity() -> str:
    """The model and the instruction sets of the CPU, which libraries and timings depend on."""
    parts = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for field in ("model name", "flags", "Features", "CPU part"):
        parts += [line for line in lines if line.startswith(field)][:1]
    return "\n".join(parts)


def digest(*parts: str) -> str:
    """A short hash of ``parts``."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
