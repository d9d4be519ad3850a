"""The engine's C library: compiled on first use, kept in the user's cache, loaded with ctypes.

The library is named by a hash of the source, the flags, the compiler and the CPU. It is
written under another name and moved into place, so that of two processes which build it
at once each finds a whole one.
"""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from slope_fx.kernels.cache import (
    CacheError,
    cache_directory,
    check_private,
    cpu_identity,
    digest,
)

SOURCES = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-w")
_MACHINES = {"x86_64": "-march=native", "amd64": "-march=native",
             "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}  # fmt: skip


class BuildError(RuntimeError):
    """The library can't be had on this machine; the message says why."""


def compile_library(target: Path, extra_flags: tuple[str, ...] = ()) -> None:
    """Compile the sources to the shared library ``target``.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    compiler, tuning = _compiler(), _tuning()
    handle, partial = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        # A compiler without OpenMP still makes a library: one that runs on one thread.
        for openmp in (("-fopenmp",), ()):
            command = [compiler, *FLAGS, tuning, *openmp, *extra_flags,
                       "-o", partial, str(SOURCES / "engine.c"), "-lm"]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.chmod(partial, 0o700)
                os.replace(partial, target)
                return
        raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    except OSError as error:
        raise BuildError(f"{compiler} can't be run: {error}") from None
    finally:
        Path(partial).unlink(missing_ok=True)


def _compiler() -> str:
    named = os.environ.get("CC")
    for name in (named,) if named else ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    raise BuildError(
        f"there is no C compiler {named!r} (from CC)" if named
        else "there is no C compiler (cc, gcc or clang) on the PATH"
    )  # fmt: skip


def _tuning() -> str:
    machine = platform.machine().lower()
    if machine not in _MACHINES or sys.byteorder != "little" or os.name != "posix":
        raise BuildError(f"{platform.system()} on {machine} is not a system it knows")
    return _MACHINES[machine]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library, compiling it first if the cache doesn't hold it.

    Raises:
        BuildError: it can't be had; asking again gives the same answer without trying.
    """
    if isinstance(result := _library_or_error(), BuildError):
        raise result
    return result


@functools.cache
def _library_or_error() -> ctypes.CDLL | BuildError:
    try:
        text = "".join(path.read_text() for path in sorted(SOURCES.glob("*.[ch]")))
        name = digest(text, *FLAGS, _tuning(), _compiler(), cpu_identity())
        path = cache_directory() / f"cpu-{name}.so"
        if not path.exists():
            compile_library(path)
        check_private(path)
        return ctypes.CDLL(str(path))
    except BuildError as error:
        return error
    except CacheError as error:
        return BuildError(str(error))
    except OSError as error:
        return BuildError(f"its library can't be loaded: {error}")
