"""Processes that run a test's function as the ranks of a gloo group.

They are started once and import everything once. Each call makes a fresh process group, and each
rank runs on one thread. A rank that fails, ends or hangs fails the call, and all are started again
for the next.
"""

import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Listener
from typing import Any

_KEY = b"ranks"


class RankError(AssertionError):
    """A rank raised an error, ended or hung."""


class Ranks:
    """A pool of processes, started when they are first needed."""

    def __init__(self) -> None:
        self._processes: list[tuple[subprocess.Popen[bytes], Any]] = []

    def run(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 240
    ) -> list[Any]:
        """Returns what ``function(*args)`` returned on each rank.

        Args:
            world: number of ranks.
            function: a function of a module, imported by its file. It may use torch.distributed.
            args: picklable arguments.
            timeout: seconds.

        Raises:
            RankError: a rank raised an error (its traceback is in the message), ended, or did not
                answer in time.
        """
        while len(self._processes) < world:
            self._processes.append(_start())
        where = function.__code__.co_filename, function.__qualname__
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self._processes[:world]):
                pipe.send_bytes(pickle.dumps((where, args, rank, world, f"{folder}/store")))
            results: dict[int, Any] = {}
            errors: dict[int, str] = {}
            end = time.monotonic() + timeout
            while len(results) + len(errors) < world and time.monotonic() < end:
                for rank, (process, pipe) in enumerate(self._processes[:world]):
                    if rank in results or rank in errors:
                        continue
                    try:
                        if pipe.poll(0.02):
                            good, value = pickle.loads(pipe.recv_bytes())
                            (results if good else errors)[rank] = value
                    except (EOFError, OSError):
                        errors[rank] = f"ended with {process.wait()}"
                if errors:  # the others wait for a rank that failed
                    end = min(end, time.monotonic() + 3)
        if errors or len(results) < world:
            self.close()
            silent = [rank for rank in range(world) if rank not in results and rank not in errors]
            lines = [f"rank {rank}: {error}" for rank, error in sorted(errors.items())]
            raise RankError("\n".join([*lines, *(f"rank {rank}: no answer" for rank in silent)]))
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._processes:
            pipe.close()
            process.kill()
            process.wait()
        self._processes = []


def _start() -> tuple["subprocess.Popen[bytes]", Any]:
    with Listener(authkey=_KEY) as listener:
        address = listener.address
        process = subprocess.Popen(
            [sys.executable, __file__, str(address)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return process, listener.accept()


def _serve(address: str) -> None:
    pipe = Client(address, authkey=_KEY)
    import torch
    import torch.distributed as dist

    import slope_fx  # noqa: F401

    torch.set_num_threads(1)
    modules: dict[str, Any] = {}
    while True:
        try:
            (file, name), args, rank, world, store = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            torch._dynamo.reset()
            torch.manual_seed(0)
            dist.init_process_group(
                "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world
            )
            if file not in modules:
                spec = importlib.util.spec_from_file_location(f"of_ranks_{len(modules)}", file)
                assert spec is not None
                assert spec.loader is not None
                modules[file] = importlib.util.module_from_spec(spec)
                sys.modules[spec.name] = modules[file]
                spec.loader.exec_module(modules[file])
            function = modules[file]
            for part in name.split("."):
                function = getattr(function, part)
            answer = True, function(*args)
            dist.barrier()
        except BaseException:
            answer = False, traceback.format_exc()
        finally:
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps(answer))  # not send: it would share tensors' memory


if __name__ == "__main__":
    _serve(sys.argv[1])
