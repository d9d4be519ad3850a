"""Atomic writes of folders, and hashes of files."""

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

from slope_fx.checkpoints.together import Together
from slope_fx.errors import CheckpointError

_PROCESS = uuid.uuid4().hex[:8]
"""Differs from that of an ended process with the same id, as a restarted container may have."""
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2, RENAME_SWAP of macOS's renamex_np


@contextmanager
def replaced_whole(path: Path, together: Together | None = None) -> Iterator[Path]:
    """Yields a temporary folder that replaces ``path`` if the block raises no error on any rank.

    The replacement is atomic: after a crash, ``path`` is the complete old folder or the complete
    new folder. The next write removes the temporary folder of a killed write. With several ranks
    this is a collective operation: rank 0 makes the folder and puts it in place. A rank that
    writes a file flushes it.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    together = together or Together()
    path = Path(os.path.abspath(path))
    partial = path
    try:
        with together.agreed():
            if together.rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                _clear_leftovers(path)
                name = f".{path.name}.partial-{_writer()}-{_PROCESS}{uuid.uuid4().hex[:8]}"
                partial = path.with_name(name)
                partial.mkdir()
        partial = path.with_name(together.gather(partial.name)[0])
        with together.agreed():
            yield partial
        with together.agreed():
            if together.rank == 0:
                for file in partial.rglob("*"):
                    _flush(file)
                _flush(partial)
                _put(partial, path)
                _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"path={str(path)!r} can't be written: {error}.") from error
    finally:
        # After an exchange, this is the old folder.
        if together.rank == 0 and partial != path:
            shutil.rmtree(partial, ignore_errors=True)


def files_in(folder: Path) -> set[str]:
    """The paths of all files in a folder and its subfolders, without hidden files."""
    names = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    return {name for name in names if not name.startswith(".") and "/." not in name}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _writer() -> str:
    """The name of this process. Other processes use it to check whether the write still runs."""
    return f"{socket.gethostname().replace('-', '_')}-{os.getpid()}"


def _clear_leftovers(path: Path) -> None:
    """Remove temporary folders of ended processes of this machine.

    Other machines may share the file system, and their writes may still run.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.partial-*-*-*"):
        host, pid, own = left.name.rsplit(".partial-", 1)[1].split("-")
        if host != _writer().split("-")[0] or not pid.isdigit():
            continue
        runs = own.startswith(_PROCESS) if int(pid) == os.getpid() else is_running(int(pid))
        if not runs:
            shutil.rmtree(left, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # the process belongs to another user
    return True


def _flush(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(partial: Path, path: Path) -> None:
    """Rename ``partial`` to ``path``, and replace the folder that exists there."""
    if not path.exists():
        try:
            os.rename(partial, path)
            return
        except OSError:
            if not path.exists():
                raise
    # The folder exists. Another process may have created it since the check above.
    if not _exchange(partial, path):
        # The system cannot exchange two folders. Between the two renames, only the backup name of
        # the old folder exists. The loader's error gives that name.
        old = previous_of(path)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        os.rename(partial, path)
        shutil.rmtree(old)


def previous_of(path: Path) -> Path:
    """The backup name of ``path`` during a replacement on systems without an exchange."""
    return path.with_name(f".{path.name}.previous")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders atomically. Returns False if the system cannot do this."""
    library = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(one), os.fsencode(other)
    here = -100  # AT_FDCWD
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        return library.renameat2(here, first, here, second, _EXCHANGE) == 0
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return library.renamex_np(first, second, _EXCHANGE) == 0
    return False
