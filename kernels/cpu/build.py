"""The C library of the engine: compiled at its first use, cached for the user, loaded by ctypes.

The name of the library has a hash of the sources, the flags, the compiler and the CPU. The file is
written under a temporary name and then renamed. Two processes that build the library at the same
time therefore both load a complete file.
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
SIGNATURES = {
    "slope_linear": "pll ppp llii pii",
    "slope_weight_grad": "pl pll pllii pii",
    "slope_transpose": "ppp llii ppii",
    "slope_expand": "pp llii pii",
    "slope_linear_quantised": "pll pppp llii ii pii",
    "slope_expand_quantised": "ppp llii ii pii",
    "slope_compress": "plp llii pii",
}
"""The arguments of the entry points: p a pointer, l a long, i an int."""
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-w")
_MACHINES = {
    "x86_64": "-march=native",
    "amd64": "-march=native",
    "aarch64": "-mcpu=native",
    "arm64": "-mcpu=native",
}


class BuildError(RuntimeError):
    """The library cannot be built or loaded on this machine. The message gives the reason."""


def compile_library(target: Path, extra_flags: tuple[str, ...] = ()) -> None:
    """Compile the sources to the shared library ``target``.

    Raises:
        BuildError: there is no compiler, or the compiler failed.
    """
    compiler, tuning = _compiler(), _tuning()
    handle, partial = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        # A compiler without OpenMP makes a library that runs on one thread.
        for openmp in (("-fopenmp",), ()):
            flags = (*FLAGS, tuning, *openmp, *extra_flags)
            command = [compiler, *flags, "-o", partial, str(SOURCES / "engine.c"), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.chmod(partial, 0o700)
                os.replace(partial, target)
                return
        raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    except OSError as error:
        raise BuildError(f"{compiler} cannot be run: {error}") from None
    finally:
        Path(partial).unlink(missing_ok=True)


def _compiler() -> str:
    named = os.environ.get("CC")
    for name in (named,) if named else ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    if named:
        raise BuildError(f"there is no C compiler {named!r} (from CC)")
    raise BuildError("there is no C compiler (cc, gcc or clang) on the PATH")


def _tuning() -> str:
    machine = platform.machine().lower()
    if machine not in _MACHINES or sys.byteorder != "little" or os.name != "posix":
        raise BuildError(f"{platform.system()} on {machine} is not supported")
    return _MACHINES[machine]


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. It is compiled first if it is not in the cache.

    Raises:
        BuildError: it cannot be built or loaded. The result is remembered: a second call does not
            try again.
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
        return _declared(ctypes.CDLL(str(path)))
    except BuildError as error:
        return error
    except CacheError as error:
        return BuildError(str(error))
    except OSError as error:
        return BuildError(f"the library cannot be loaded: {error}")


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    types = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int}
    for name, codes in SIGNATURES.items():
        getattr(loaded, name).argtypes = [types[code] for code in codes.replace(" ", "")]
    return loaded
