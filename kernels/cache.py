"""Where compiled kernels and measured choices are kept, and what names them.

Nothing is loaded from a place that another user could have written to.
"""

import functools
import hashlib
import os
import platform
from pathlib import Path


class CacheError(RuntimeError):
    """There is no place to keep things in; the message says why."""


def cache_directory() -> Path:
    """Where compiled kernels and measured choices are kept: a directory of the user's own.

    ``SLOPE_FX_CACHE_DIR``, or ``slope_fx`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        CacheError: it can't be made, or somebody else may write to it.
    """
    named = os.environ.get("SLOPE_FX_CACHE_DIR")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    path = (Path(named) if named else base / "slope_fx").expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(path)
    except OSError as error:
        raise CacheError(f"the cache directory {path} can't be used: {error}") from None
    return path


def check_private(path: Path) -> None:
    """See that nobody but the user may have written to ``path``.

    Raises:
        CacheError: somebody may.
    """
    if not hasattr(os, "getuid"):
        return
    found = path.stat()
    if found.st_uid != os.getuid():
        raise CacheError(f"{path} belongs to another user; set SLOPE_FX_CACHE_DIR")
    if found.st_mode & 0o022:
        raise CacheError(f"others may write to {path} (run chmod go-w on it)")


@functools.cache
def cpu_identity() -> str:
    """What tells this CPU from one that the same library or timings would not suit."""
    parts = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for field in ("model name", "flags", "Features", "CPU part"):
        parts += [line for line in lines if line.startswith(field)][:1]
    return "\n".join(parts)


def digest(*parts: str) -> str:
    """A short name for ``parts``."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
