"""The libraries of the engine: compiled at their first use, cached for the user.

- The C library, which ctypes loads.
- The library of the ops of a frozen model: the same C, registered with PyTorch's dispatcher by
  ``frozen.cpp``.

The name of a library has a hash of the sources, the flags, the compilers and the CPU. The file is
written under a temporary name and then renamed. Two processes that build a library at the same
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
from collections.abc import Callable
from pathlib import Path

import torch

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
    "slope_stream": "pll pi lii ii ii",
    "slope_expand_quantised": "ppp llii ii pii",
    "slope_compress": "plp llii pii",
}
"""The arguments of the entry points: p a pointer, l a long, i an int."""
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-w")
CPP_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-w")
FEATURES = {
    "__AVX2__ ": "avx2",
    "__FMA__ ": "fma",
    "__BMI2__ ": "bmi2",
    "__AVX512F__ ": "avx512f",
    "__AVX512BW__ ": "avx512bw",
    "__AVX512VL__ ": "avx512vl",
    "__AVX512DQ__ ": "avx512dq",
    "__AVX512VBMI__ ": "avx512vbmi",
    "__AVX512VBMI2__ ": "avx512vbmi2",
    "__AVX512VNNI__ ": "avx512vnni",
    "__AVX512BF16__ ": "avx512bf16",
}
"""Instruction sets of x86 CPUs: the macro of a C compiler, and the name for the check at load."""
_MACHINES = {
    "x86_64": "-march=native",
    "amd64": "-march=native",
    "aarch64": "-mcpu=native",
    "arm64": "-mcpu=native",
}


class BuildError(RuntimeError):
    """The library cannot be built or loaded on this machine. The message gives the reason."""


def compile_library(target: Path, extra_flags: tuple[str, ...] = ()) -> None:
    """Compile the C sources to the shared library ``target``.

    Raises:
        BuildError: there is no compiler, or the compiler failed.
    """
    compiler, flags = _compiler(), (*FLAGS, _tuning(), *extra_flags)

    def build(partial: str, openmp: tuple[str, ...]) -> None:
        _run([compiler, *flags, *openmp, "-o", partial, str(SOURCES / "engine.c"), "-lm"])

    _written(target, build)


def compile_ops(target: Path, *, define: bool = False) -> None:
    """Compile the C sources and ``frozen.cpp`` to the shared library ``target``.

    Args:
        target: the file.
        define: whether the library defines the ops too. A process that imports slope_fx has the
            definitions; one that does not needs them.

    Raises:
        BuildError: there is no compiler, or a compiler failed.
    """
    c, cpp, home = _compiler(), _compiler(cpp=True), Path(torch.__file__).parent
    defined = ("-DSLOPE_DEFINE",) if define else ()

    def build(partial: str, openmp: tuple[str, ...]) -> None:
        objects = [f"{partial}.c.o", f"{partial}.cpp.o"]
        try:
            compiled = (*FLAGS, _tuning(), *openmp, "-fvisibility=hidden", "-c")
            _run([c, *compiled, str(SOURCES / "engine.c"), "-o", objects[0]])
            include = f"-I{home / 'include'}"
            needs = f"-DSLOPE_NEEDS={_needs(c)}"
            flags = (*CPP_FLAGS, *defined, needs, include)
            _run([cpp, *flags, "-c", str(SOURCES / "frozen.cpp"), "-o", objects[1]])
            libraries = (f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", "-lm")
            _run([cpp, "-shared", *openmp, *objects, *libraries, "-o", partial])
        finally:
            for made in objects:
                Path(made).unlink(missing_ok=True)

    _written(target, build)


def _written(target: Path, build: Callable[[str, tuple[str, ...]], None]) -> None:
    """Build ``target`` under a temporary name, and rename it."""
    handle, partial = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        try:
            build(partial, ("-fopenmp",))
        except BuildError:
            build(partial, ())  # a compiler without OpenMP makes a library that runs on one thread
        os.chmod(partial, 0o700)
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)


def _needs(compiler: str) -> str:
    """The instruction sets that the C sources are compiled for, for frozen.cpp."""
    defined = _run([compiler, _tuning(), "-dM", "-E", "-x", "c", os.devnull])
    return "".join(f'FEATURE("{name}")' for macro, name in FEATURES.items() if macro in defined)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def _compiler(*, cpp: bool = False) -> str:
    variable, kind = ("CXX", "C++") if cpp else ("CC", "C")
    known = ("c++", "g++", "clang++") if cpp else ("cc", "gcc", "clang")
    named = os.environ.get("CXX") if cpp else os.environ.get("CC")
    for name in (named,) if named else known:
        if found := shutil.which(name):
            return found
    if named:
        raise BuildError(f"there is no {kind} compiler {named!r} (from {variable})")
    raise BuildError(
        f"there is no {kind} compiler ({known[0]}, {known[1]} or {known[2]}) on the PATH"
    )


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
        path = _cached("cpu", compile_library, _compiler())
        return _declared(ctypes.CDLL(str(path)))
    except BuildError as error:
        return error
    except OSError as error:
        return BuildError(f"the library cannot be loaded: {error}")


def ops_library(*, define: bool = False) -> Path:
    """The library of the ops of a frozen model. It is compiled first if it is not in the cache.

    Args:
        define: as in :func:`compile_ops`.

    Raises:
        BuildError: it cannot be built.
    """

    def build(target: Path) -> None:
        compile_ops(target, define=define)

    about = (*CPP_FLAGS, str(torch.__version__), str(define))
    return _cached("ops", build, _compiler(), _compiler(cpp=True), *about)


def _cached(kind: str, build: Callable[[Path], None], *about: str) -> Path:
    """A library in the cache, built if necessary. ``about`` is what it depends on."""
    try:
        text = "".join(path.read_text() for path in sorted(SOURCES.glob("*.[ch]*")))
        name = digest(text, *FLAGS, _tuning(), *about, cpu_identity())
        path = cache_directory() / f"{kind}-{name}.so"
        if not path.exists():
            build(path)
        check_private(path)
    except CacheError as error:
        raise BuildError(str(error)) from None
    return path


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    types = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int}
    for name, codes in SIGNATURES.items():
        getattr(loaded, name).argtypes = [types[code] for code in codes.replace(" ", "")]
    return loaded
