"""Races: measure which of several functions is the fastest on this machine. Keeps the results.

``selection`` races engines, and an engine can race its own tile sizes. A file beside the compiled
kernels keeps the :class:`Result` of each race. There is one file for each device, version of
PyTorch and state of the sources, so that a machine measures each case once.
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
"""The largest number of tokens in a race. Beyond it, times grow in proportion to the tokens."""

_MOST_ROUNDS = 25
_SECONDS, _PATIENCE = 0.2, 2.0
"""The seconds of a race on a quiet machine, and on a busy machine."""
_QUIET = 1.5
"""The largest ratio of the median and the best time on a quiet machine."""
_HOPELESS, _COSTLY = 3.0, 0.01
"""A function is not repeated if its time is larger than both: this multiple of the fastest time,
and these seconds."""

_LAUNCH_CYCLES = 1_000_000
"""The cycles for which the GPU waits while the kernels of a run are launched."""

Runs = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Result:
    """The result of a race.

    Attributes:
        winner: name of the fastest candidate.
        seconds: best time by name.
    """

    winner: str
    seconds: dict[str, float]


def bucket(tokens: int) -> int:
    """The number of tokens rounded up to a power of two, at most :data:`MOST_TOKENS`."""
    return min(1 << max(tokens - 1, 0).bit_length(), MOST_TOKENS)


def can_measure(device: torch.device) -> bool:
    """Whether a race is possible now. During the capture of a CUDA graph it is not."""
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return not torch.cuda.is_current_stream_capturing()


def recall(entry: str, candidates: tuple[str, ...], device: torch.device) -> Result | None:
    """The result on disk under the name ``entry``, or None."""
    found = _stored(device).get(entry, {})
    try:
        result = Result(found["winner"], {k: float(v) for k, v in found["seconds"].items()})
    except (TypeError, KeyError, AttributeError, ValueError):
        return None
    return result if result.winner in candidates and result.winner in result.seconds else None


def run(
    entry: str, prepare: Callable[[], Runs], candidates: tuple[str, ...], device: torch.device
) -> Result:
    """Race functions. The fastest of the candidates wins.

    Args:
        entry: name of the result on disk. It is not kept if the machine was too busy.
        prepare: makes the functions and their data. It can leave out candidates that cannot run.
        candidates: names of the functions that can win.
        device: of the data.
    """
    with undisturbed():
        seconds, quiet = race(prepare(), device)
    running = [name for name in candidates if name in seconds]
    result = Result(min(running, key=lambda name: seconds[name]), seconds)
    if quiet:  # only this process uses an uncertain result
        _keep(entry, result, device)
    return result


def race(runs: Runs, device: torch.device) -> tuple[dict[str, float], bool]:
    """The best time of each function, which run in turns, and whether the machine was quiet.

    The fastest run was disturbed the least. Usually, graphs are compiled at the same time, and a
    product that shares its cores with a compiler can take ten times as long. If the times differ
    much, the race therefore takes longer.
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
    """A function that runs another function and returns its seconds on ``device``."""
    return _cuda_timer(device) if device.type == "cuda" else _cpu_timed


def _cpu_timed(thunk: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    thunk()
    return time.perf_counter() - begun


def _cuda_timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """A timer by two events on the current stream.

    Before each run, the L2 cache is filled with other data, as in a model whose weights are larger
    than this cache. Then the GPU waits for about half a millisecond while the kernels are launched,
    so that the time of the launches is not measured.
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
    """The file of the results for a device, or None if the cache directory cannot be used."""
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
    # The name, the memory and the multiprocessors identify a type of GPU.
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
        return  # the next process measures again


def forget_disk() -> None:
    """Find the directory and read the files again at the next use."""
    _store.cache_clear()
    _stored.cache_clear()
