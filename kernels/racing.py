"""Races: which of several ways to compute the same thing is the fastest here, kept on disk.

``selection`` races engines, an engine may race its own tile sizes. What was measured is a
:class:`Result`, which a file beside the compiled kernels keeps, one for each device, version
and source of the engines, so that a machine measures a thing once.
"""

import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from slope_fx.kernels.cache import CacheError, cache_directory, cpu_identity, digest
from slope_fx.kernels.modes import undisturbed

MOST_TOKENS = 2048
"""More tokens than these are measured as so many: time grows in proportion by then."""

_MOST_ROUNDS = 25
_SECONDS, _PATIENCE = 0.2, 2.0
"""How long a race goes on, on a quiet machine and on a busy one."""
_QUIET = 1.5
"""What the median may be of the best run on a quiet machine."""
_HOPELESS, _COSTLY = 3.0, 0.01
"""A run that takes so many seconds, and so many times the fastest, isn't repeated."""

_LAUNCH_CYCLES = 1_000_000
"""Of a GPU's clock: what it is kept waiting for while something to be timed is launched."""

Runs = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Result:
    """What a race came to.

    Attributes:
        winner: name of the fastest of those that could be taken.
        seconds: best time by name; empty if nothing was measured.
    """

    winner: str
    seconds: dict[str, float]


def bucket(tokens: int) -> int:
    """Tokens rounded up to a power of two, at most :data:`MOST_TOKENS`."""
    return min(1 << max(tokens - 1, 0).bit_length(), MOST_TOKENS)


def can_measure(device: torch.device) -> bool:
    """Whether a race can be held now: not while a CUDA graph is captured."""
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return not torch.cuda.is_current_stream_capturing()


def recall(entry: str, candidates: tuple[str, ...], device: torch.device) -> Result | None:
    """What an earlier process measured under the name ``entry``, if it has kept it."""
    found = _stored(device).get(entry, {})
    try:
        result = Result(found["winner"], {k: float(v) for k, v in found["seconds"].items()})
    except (TypeError, KeyError, AttributeError, ValueError):
        return None
    return result if result.winner in candidates and result.winner in result.seconds else None


def run(
    entry: str, prepare: Callable[[], Runs], candidates: tuple[str, ...], device: torch.device
) -> Result:
    """Time runs against each other; of the ``candidates`` the fastest wins.

    It is kept under the name ``entry``, unless the machine was too busy to tell. ``prepare``
    makes the runs, and their data; of a candidate that can't run after all it makes none.
    """
    with undisturbed():
        seconds, quiet = race(prepare(), device)
    running = [name for name in candidates if name in seconds]
    result = Result(min(running, key=lambda name: seconds[name]), seconds)
    if quiet:  # a doubtful result serves this process, and no later one
        _keep(entry, result, device)
    return result


def race(runs: Runs, device: torch.device) -> tuple[dict[str, float], bool]:
    """Seconds of each at its best, run in turns, and whether the machine was quiet.

    The best run is the least disturbed one. Graphs are compiled at the same time, as a rule,
    and a product that shares its cores with a compiler can take ten times as long; so
    the race goes on for a while if its runs differ much.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    timed = timer(device)
    for thunk in runs.values():
        thunk()
    started = time.perf_counter()
    quiet = False
    for turn in range(_MOST_ROUNDS):
        fastest = min((min(t) for t in times.values() if t), default=0.0)
        for name, thunk in runs.items():
            if turn and min(times[name]) > max(_HOPELESS * fastest, _COSTLY):
                continue
            times[name].append(timed(thunk))
        best = {name: min(taken) for name, taken in times.items()}
        quiet = all(statistics.median(times[name]) < _QUIET * best[name] for name in runs)
        spent = time.perf_counter() - started
        if turn >= 2 and spent > (_SECONDS if quiet else _PATIENCE):
            break
    return best, quiet


def timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """What runs a thunk and returns the seconds that it took on ``device``."""
    return _cuda_timer(device) if device.type == "cuda" else _cpu_timed


def _cpu_timed(thunk: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    thunk()
    return time.perf_counter() - begun


def _cuda_timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """Seconds of a thunk between two events on the current stream.

    Each run finds the L2 cache full of something else, as it does in a model whose weights
    together are larger than that cache. The GPU is then kept waiting for some half of a
    millisecond, while the thunk's kernels are launched, so that their launches don't count.
    """
    properties = torch.cuda.get_device_properties(device)
    filler = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device=device)

    def timed(thunk: Callable[[], Any]) -> float:
        with torch.cuda.device(device):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            filler.zero_()
            torch.cuda._sleep(_LAUNCH_CYCLES)
            begun.record()
            thunk()
            ended.record()
            ended.synchronize()
            return float(begun.elapsed_time(ended)) / 1000

    return timed


# --- on disk -------------------------------------------------------------------------------


@functools.cache
def _store(device: torch.device) -> Path | None:
    """The file of what was measured on such a device, or None if there is no place for one."""
    try:
        here = Path(__file__).parent
        sources = sorted(p for p in here.rglob("*") if p.suffix in (".c", ".h", ".py"))
        text = "".join(path.read_text() for path in sources)
        name = digest("3", torch.__version__, torch.__config__.show(), _identity(device), text)
        return cache_directory() / f"races-{name}.json"
    except (CacheError, OSError):
        return None


def _identity(device: torch.device) -> str:
    if device.type != "cuda":
        return cpu_identity()
    # Its name, memory, multiprocessors; not its number.
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {properties.total_memory} {properties.multi_processor_count}"


@functools.cache
def _stored(device: torch.device) -> dict[str, Any]:
    return _read(_store(device))


def _read(path: Path | None) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _keep(entry: str, result: Result, device: torch.device) -> None:
    path = _store(device)
    if path is None:
        return
    try:
        with FileLock(f"{path}.lock", timeout=5):
            stored = _read(path)
            stored[entry] = asdict(result)
            handle, partial = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "w") as file:
                json.dump(stored, file, indent=0)
            os.replace(partial, path)
    except (OSError, TimeoutError):
        return  # what isn't kept is measured again, no more


def forget_disk() -> None:
    """Read the files anew, and look for their place anew, at the next use."""
    _store.cache_clear()
    _stored.cache_clear()
