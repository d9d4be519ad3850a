"""Folders that are written whole or not at all, and hashes of what is in them."""

import ctypes
import glob
import hashlib
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from slope_fx.errors import CheckpointError

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2, RENAME_SWAP of macOS's renamex_np


@contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``path`` when the block ends well.

    Until then ``path`` is as it was: whoever looks, or starts after a crash, finds the old folder
    or the new one, whole. What is left of a write that was killed goes with the next one.

    Raises:
        CheckpointError: the folder can't be written.
    """
    path = Path(os.path.abspath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path)
        partial = path.with_name(f".{path.name}.partial-{_writer()}-{uuid.uuid4().hex[:8]}")
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"path={str(path)!r} can't be written: {error}.") from error
    try:
        yield partial
        for file in partial.rglob("*"):
            _flush(file)
        _flush(partial)
        _put(partial, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"path={str(path)!r} can't be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # the old one, if the two were exchanged


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _writer() -> str:
    """Names this process, so that others can tell whether it still writes."""
    return f"{socket.gethostname().replace('-', '_')}-{os.getpid()}"


def _clear_leftovers(path: Path) -> None:
    """Remove what processes of this machine left that run no more; others may still write."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.partial-*-*-*"):
        host, pid, _ = left.name.rsplit(".partial-", 1)[1].split("-")
        here = _writer().split("-")[0]
        if host == here and pid.isdigit() and not is_running(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Whether a process of this machine lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is somebody else's
    return True


def _flush(path: Path) -> None:
    """Make the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(partial: Path, path: Path) -> None:
    """Give ``partial`` the name ``path``."""
    if not path.exists():
        try:
            os.rename(partial, path)
            return
        except OSError:
            if not path.exists():
                raise
    # It is there, perhaps since a moment ago: another process writes to it too.
    if not _exchange(partial, path):
        # A system that can't swap two folders: for a moment there is only the old one's other
        # name, which the loader's error names.
        old = previous_of(path)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        os.rename(partial, path)
        shutil.rmtree(old)


def previous_of(path: Path) -> Path:
    """Where the folder ``path`` is while a new one takes its place, if they can't be swapped."""
    return path.with_name(f".{path.name}.previous")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False if this system can't."""
    library = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(one), os.fsencode(other)
    here = -100  # AT_FDCWD
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        return library.renameat2(here, first, here, second, _EXCHANGE) == 0
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return library.renamex_np(first, second, _EXCHANGE) == 0
    return False
