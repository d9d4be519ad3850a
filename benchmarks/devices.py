"""A device to measure on, and what is measured there: steps of models, their time and memory."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import slope_fx
from slope_fx.kernels import racing
from slope_fx.kernels.cusparselt import library

DTYPE = torch.bfloat16

Runs = dict[str, Callable[[], Any]]


class Bench:
    """A device, its timer, its limits, and the time that may be spent."""

    def __init__(self, device: torch.device, seconds: float, rounds: int) -> None:
        self.device = device
        self.rounds = rounds
        self.timed = racing.timer(device)
        self.started, self.until = time.monotonic(), 0.0
        self.budget = seconds
        self.left_out: list[str] = []
        self.wrong: list[str] = []
        on_gpu = device.type == "cuda"
        self.bytes_per_second = self._copy(2**30 if on_gpu else 2**20)
        self.flops_per_second = self._product(8192 if on_gpu else 256)

    def _copy(self, size: int) -> float:
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.medians({"": lambda: target.copy_(source)})[""]

    def _product(self, width: int) -> float:
        a, b = self.normal(width, width), self.normal(width, width)
        return 2 * width**3 / self.medians({"": lambda: a @ b})[""]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=DTYPE)

    def seconds(self, runs: Runs) -> dict[str, list[float]]:
        """Of each run, in turns, after one turn that isn't counted."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(self.rounds + 1):
            for name, run in runs.items():
                spent = self.timed(run)
                if turn:
                    times[name].append(spent)
        return times

    def medians(self, runs: Runs) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.seconds(runs).items()}

    def section(
        self, share: float, each: Callable[..., Iterator[dict[str, Any]]], cases: list[Any]
    ) -> list[dict[str, Any]]:
        """All entries of a section, whose cases begin until that share of the time is spent.

        A case whose results are wrong is noted, and has no entries.
        """
        self.until = self.started + share * self.budget
        entries: list[dict[str, Any]] = []
        for case in tqdm(cases, each.__name__):
            try:
                entries += list(each(self, *case))
            except SystemExit as error:
                self.wrong.append(str(error))
        return entries

    def in_time(self, what: str) -> bool:
        """Whether there is time for one more; if not, it is noted."""
        if time.monotonic() < self.until:
            return True
        self.left_out.append(what)
        return False


def expanded(dense: nn.Module, sparse: nn.Module) -> nn.Module:
    """A plain model of the sparse one's weights."""
    model = copy.deepcopy(dense)
    for name, weight in slope_fx.sparse_weights(sparse).items():
        model.get_parameter(f"{name}.weight").data.copy_(weight.to_dense().detach())
    return model


def stepper(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward_pass(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    return run


def state_bytes(model: nn.Module) -> int:
    """Bytes of weights, masks and AdamW's moments, all in bf16: what lives between two steps."""
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return sum(p.nbytes for p in model.parameters()) + 2 * trained


def extra_bytes(bench: Bench, step: Callable[[], None]) -> int | None:
    """Bytes that a step takes at its peak beyond what lives from step to step."""
    if bench.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def device_of(bench: Bench) -> dict[str, Any]:
    """What the figures depend on: the device, its limits as measured, versions."""
    versions: dict[str, Any] = {
        "triton": __import__("triton").__version__, "cusparselt": library.version(),
    }  # fmt: skip
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        versions |= {
            "gpu": properties.name, "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda, "cublas": torch.backends.cuda.preferred_blas_library().name,
        }  # fmt: skip
    return {
        **versions, "copy_bytes_per_second": bench.bytes_per_second,
        "product_flops_per_second": bench.flops_per_second,
    }  # fmt: skip
