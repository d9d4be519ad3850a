"""Which engine computes a product: the fastest that was measured, or the one that was named.

A :class:`Problem` is a product as far as speed goes. The first time one is met, the engines
that can serve it run it on made-up data, in turns; the best runs decide, and are kept on disk
beside the compiled kernels, so that a machine measures a problem once. The plain dense
product is timed along with them: it computes what a dense layer would, so it takes no part
in the choice, but says what was gained.

``SLOPE_FX_ENGINES`` limits the choice: names separated by commas are the engines allowed,
names after a minus are forbidden (``cpu``; ``cpu,dense``; ``-cpu``). With one engine left
there is nothing to measure. ``dense`` does what ``cpu-dense`` does, slower, and ``reference``
slower still: unless it is named, the one takes part only where the other can't, the other
not at all.
"""

import contextlib
import functools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from slope_fx.kernels import cpu, cpu_dense, dense, reference
from slope_fx.kernels.cpu.build import SOURCES, BuildError, cache_directory, cpu_identity, digest
from slope_fx.kernels.errors import EngineError, EngineWarning
from slope_fx.kernels.packing import pack

ENGINES: dict[str, ModuleType] = {
    "cpu": cpu,
    "cpu-dense": cpu_dense,
    "dense": dense,
    "reference": reference,
}
COMPETING = ("cpu", "cpu-dense", "dense")
AUTO = "auto"
PRODUCTS = ("sparse_linear", "sparse_input_grad", "sparse_weight_grad")

MOST_TOKENS = 2048
"""More tokens than these are measured as so many: time grows in proportion by then."""

_MOST_ROUNDS = 25
_SECONDS, _PATIENCE = 0.2, 2.0
"""How long a race goes on, on a quiet machine and on a busy one."""
_QUIET = 1.5
"""What the median may be of the best run on a quiet machine."""
_HOPELESS, _COSTLY = 3.0, 0.01
"""A run that takes so many seconds, and so many times the fastest, isn't repeated."""


@dataclass(frozen=True)
class Problem:
    """A product as far as speed goes.

    Attributes:
        op: one of :data:`PRODUCTS`.
        tokens: rows of the input, rounded up to a power of two.
        d_out, d_in: size of the weight.
        n, m: its pattern.
        dtype: "float32" and so on.
        threads: that torch uses.
    """

    op: str
    tokens: int
    d_out: int
    d_in: int
    n: int
    m: int
    dtype: str
    threads: int


@dataclass(frozen=True)
class Choice:
    """The engine for a problem.

    Attributes:
        engine: its name.
        seconds: best time by engine, and under "plain" that of the dense product with a
            dense weight; empty if nothing was measured.
    """

    engine: str
    seconds: dict[str, float]

    @property
    def speedup(self) -> float | None:
        """How much faster than the plain dense product; None if nothing was measured."""
        plain = self.seconds.get("plain")
        return None if plain is None else plain / self.seconds[self.engine]


def allowed_engines(engines: str = AUTO) -> tuple[str, ...]:
    """The engines that ``engines`` and the environment allow, best first.

    Args:
        engines: "auto", or names separated by commas. Anything but "auto" overrides
            ``SLOPE_FX_ENGINES``.

    Raises:
        EngineError: a name is not an engine's, or none is left.
    """
    source, text = "engine", engines
    if engines == AUTO:
        source, text = "SLOPE_FX_ENGINES", os.environ.get("SLOPE_FX_ENGINES", "")
    return _parse(source, text)


def limited(engines: str) -> str:
    """``engines`` with what the environment says in the place of "auto".

    So a graph that has it is a graph of that environment, in torch.compile's caches too.
    """
    return (os.environ.get("SLOPE_FX_ENGINES", "").strip() or AUTO) if engines == AUTO else engines


@functools.cache
def _parse(source: str, text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name.removeprefix("-") not in ENGINES]
    if unknown:
        raise EngineError(
            f"{source}={text!r}: {unknown[0]!r} is not an engine; there are "
            f"{', '.join(ENGINES)}. Allowed are names separated by commas, or -name to forbid one."
        )
    named = tuple(name for name in ENGINES if name in names)
    left = tuple(name for name in named or COMPETING if f"-{name}" not in names)
    if not left:
        raise EngineError(f"{source}={text!r} leaves no engine; there are {', '.join(ENGINES)}.")
    return left


def engines_for(device: torch.device, dtype: torch.dtype, engines: str = AUTO) -> tuple[str, ...]:
    """Those of the allowed engines that can serve such tensors; ``dense`` if none can.

    What can't serve is said once, with the reason.
    """
    names = allowed_engines(engines)
    able: list[str] = []
    for name in names:
        reason = _why_not(name, device, dtype)
        if not reason:
            if name == "dense" and "cpu-dense" in able and not _is_named(name, engines):
                continue
            able.append(name)
        elif name == "cpu-dense" and "cpu" in names:
            continue  # for the same reason as cpu
        elif not dtype.is_floating_point:
            continue  # a mask on its way through expand; no product
        elif device.type == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16):
            _say_once(f"slope_fx's {name} engine is not used: {reason}.")
        elif len(names) == 1:
            _say_once(f"slope_fx's {name} engine was asked for, but {reason}; dense serves.")
    return tuple(able) or ("dense",)


def _is_named(name: str, engines: str) -> bool:
    text = os.environ.get("SLOPE_FX_ENGINES", "") if engines == AUTO else engines
    return name in [part.strip() for part in text.split(",")]


@functools.cache
def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str:
    reason: str = ENGINES[name].why_not(device, dtype)
    return reason


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, EngineWarning, stacklevel=2)


def choose(
    op: str,
    tokens: int,
    values: tuple[int, int],
    n: int,
    m: int,
    dtype: torch.dtype,
    device: torch.device,
    engines: str = AUTO,
) -> str:
    """The name of the engine for a product, measuring it if need be.

    Args:
        op: one of :data:`PRODUCTS`.
        tokens: rows of the input.
        values: shape of the weight's values, (d_out, d_in * N / M).
        n, m: the pattern.
        dtype, device: of the operands.
        engines: who may compute it, as in :func:`allowed_engines`.
    """
    candidates = engines_for(device, dtype, engines)
    problem = Problem(
        op,
        min(1 << max(tokens - 1, 0).bit_length(), MOST_TOKENS),
        values[0], values[1] * m // n, n, m, str(dtype).removeprefix("torch."),
        torch.get_num_threads(),
    )  # fmt: skip
    return choice_for(problem, candidates, device).engine


def choice_for(problem: Problem, candidates: tuple[str, ...], device: torch.device) -> Choice:
    """The choice among ``candidates``: from memory, from disk, or measured now."""
    key = (problem, candidates, str(device))
    if key not in _made:
        if len(candidates) == 1:
            _made[key] = Choice(candidates[0], {})
        else:
            _made[key] = _from_disk(problem, candidates) or _measured(problem, candidates, device)
    return _made[key]


_made: dict[tuple[Problem, tuple[str, ...], str], Choice] = {}


def choices(d_out: int, d_in: int, n: int, m: int) -> list[tuple[Problem, Choice]]:
    """What was chosen in this process for weights of that size and pattern."""
    size = (d_out, d_in, n, m)
    return [
        (problem, choice)
        for (problem, _, _), choice in list(_made.items())
        if (problem.d_out, problem.d_in, problem.n, problem.m) == size
    ]


def forget() -> None:
    """Forget the choices of this process; those on disk stay."""
    _made.clear()


# --- measuring -----------------------------------------------------------------------------


def _measured(problem: Problem, candidates: tuple[str, ...], device: torch.device) -> Choice:
    with _undisturbed(device):
        runs = _runs(problem, candidates, device)
        seconds, quiet = _race(runs)
    best = min(candidates, key=lambda name: seconds[name])
    choice = Choice(best, seconds)
    if quiet:  # a doubtful choice serves this process, and no later one
        _to_disk(problem, candidates, choice)
    return choice


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Out of whatever traces, differentiates or casts the caller's tensors."""
    with (
        _disable_current_modes(),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch._C._DisableFuncTorch(),
    ):
        yield


def _runs(
    problem: Problem, candidates: tuple[str, ...], device: torch.device
) -> dict[str, Callable[[], Any]]:
    """The product by each candidate, and by dense as "plain", on made-up data."""
    d_out, d_in, n, m = problem.d_out, problem.d_in, problem.n, problem.m
    dtype = getattr(torch, problem.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    x, grad = normal(problem.tokens, d_in), normal(problem.tokens, d_out)
    values, weight = normal(d_out, d_in * n // m), normal(d_out, d_in)
    forward = pack(_random_mask(d_out, d_in, n, m, generator))
    backward = dense.backward_mask(values, forward, n, m)

    def run(name: str) -> Callable[[], Any]:
        operation = getattr(ENGINES[name], problem.op)
        arguments = {
            "sparse_linear": (x, values, forward, None, n, m),
            "sparse_input_grad": (grad, values, forward, backward, n, m),
            "sparse_weight_grad": (grad, x, forward, n, m),
        }[problem.op]
        return lambda: operation(*arguments)

    plain: dict[str, Callable[[], Any]] = {
        "sparse_linear": lambda: torch.nn.functional.linear(x, weight),
        "sparse_input_grad": lambda: grad @ weight,
        "sparse_weight_grad": lambda: grad.t() @ x,
    }
    return {**{name: run(name) for name in candidates}, "plain": plain[problem.op]}


def _random_mask(d_out: int, d_in: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    rows = min(d_out, 64)
    order = torch.rand(rows, d_in // m, m, generator=generator, device=generator.device).argsort(-1)
    return (order < n).view(rows, d_in).repeat(-(-d_out // rows), 1)[:d_out]


def _race(runs: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], bool]:
    """Seconds of each at its best, run in turns, and whether the machine was quiet.

    The best run is the least disturbed one. Graphs are compiled at the same time, as a rule,
    and a product that shares its cores with a compiler can take ten times as long; so
    the race goes on for a while if its runs differ much.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    started = time.perf_counter()
    quiet = False
    for turn in range(_MOST_ROUNDS):
        fastest = min((min(t) for t in times.values() if t), default=0.0)
        for name, run in runs.items():
            if turn and min(times[name]) > max(_HOPELESS * fastest, _COSTLY):
                continue
            begun = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begun)
        best = {name: min(taken) for name, taken in times.items()}
        quiet = all(statistics.median(times[name]) < _QUIET * best[name] for name in runs)
        spent = time.perf_counter() - started
        if turn >= 2 and spent > (_SECONDS if quiet else _PATIENCE):
            break
    return best, quiet


# --- on disk -------------------------------------------------------------------------------


@functools.cache
def _store() -> Path | None:
    """The file of this machine's choices, or None if there is no place for one."""
    try:
        sources = "".join(path.read_text() for path in sorted(SOURCES.glob("*.[ch]")))
        name = digest("2", torch.__version__, torch.__config__.show(), cpu_identity(), sources)
        return cache_directory() / f"choices-{name}.json"
    except (BuildError, OSError):
        return None


def _entry(problem: Problem, candidates: tuple[str, ...]) -> str:
    return json.dumps([*asdict(problem).values(), list(candidates)])


@functools.cache
def _stored() -> dict[str, Any]:
    return _read(_store())


def _read(path: Path | None) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _from_disk(problem: Problem, candidates: tuple[str, ...]) -> Choice | None:
    found = _stored().get(_entry(problem, candidates), {})
    try:
        choice = Choice(found["engine"], {k: float(v) for k, v in found["seconds"].items()})
    except (TypeError, KeyError, AttributeError, ValueError):
        return None
    return choice if choice.engine in candidates and choice.engine in choice.seconds else None


def _to_disk(problem: Problem, candidates: tuple[str, ...], choice: Choice) -> None:
    path = _store()
    if path is None:
        return
    try:
        with FileLock(f"{path}.lock", timeout=5):
            stored = _read(path)
            stored[_entry(problem, candidates)] = asdict(choice)
            handle, partial = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "w") as file:
                json.dump(stored, file, indent=0)
            os.replace(partial, path)
    except (OSError, TimeoutError):
        return  # a choice that isn't kept is measured again, no more
