"""Which engine computes a product: the fastest that was measured, or the one that was named.

A :class:`Problem` is a product as far as speed goes. The first time one is met, the engines
that can serve it run it on made-up data, in turns; the best runs decide, and are kept on disk
beside the compiled kernels, so that a machine measures a problem once. The plain dense
product is timed along with them: it computes what a dense layer would, so it takes no part
in the choice, but says what was gained. An engine that makes an operand of the weight makes it
in each of its runs, unless it will be kept for good.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from slope_fx.kernels import cpu, dense, operands, racing
from slope_fx.kernels.cusparselt import Cusparselt
from slope_fx.kernels.engines import (
    AUTO,
    ENGINES,
    TAKE_WIDER_VALUES,
    engines_for,
    engines_taking,
    say_once,
)
from slope_fx.kernels.modes import undisturbed
from slope_fx.kernels.packing import pack

PRODUCTS = ("sparse_linear", "sparse_input_grad", "sparse_weight_grad")


@dataclass(frozen=True)
class Problem:
    """A product as far as speed goes.

    Attributes:
        op: one of :data:`PRODUCTS`.
        tokens: rows of the input, rounded up to a power of two.
        d_out, d_in: size of the weight.
        n, m: its pattern.
        dtype: "float32" and so on.
        threads: that torch uses on a CPU; 0 on other devices.
        values_dtype: of the weight's values, if wider, as under autocast; else "".
        anew: whether a candidate makes an operand of the weight at each use: of a weight that
            trains, and of any unless operands are to be kept.
    """

    op: str
    tokens: int
    d_out: int
    d_in: int
    n: int
    m: int
    dtype: str
    threads: int
    values_dtype: str = ""
    anew: bool = False


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


def choose(
    op: str,
    tokens: int,
    values: tuple[int, int],
    n: int,
    m: int,
    dtype: torch.dtype,
    device: torch.device,
    engines: str = AUTO,
    values_dtype: torch.dtype | None = None,
    trains: bool = True,
) -> str:
    """The name of the engine for a product, measuring it if need be.

    Args:
        op: one of :data:`PRODUCTS`.
        tokens: rows of the input.
        values: shape of the weight's values, (d_out, d_in * N / M).
        n, m: the pattern.
        dtype, device: of the operands.
        engines: who may compute it, as in :func:`engines.allowed_engines`.
        values_dtype: of the values, if not ``dtype``.
        trains: whether the values change between one use and the next.
    """
    candidates = engines_taking(op, n, m, engines_for(device, dtype, engines))
    if device.type == "cuda" and racing.can_measure(device):
        # Made now, or they would first be made in the memory of a CUDA graph, and live on in it.
        with undisturbed():
            dense.make_tables(n, m, device)
    reads_values = op != "sparse_weight_grad"
    keeping = any(isinstance(ENGINES[name], Cusparselt) for name in candidates)
    wider = reads_values and values_dtype not in (None, dtype)
    problem = Problem(
        op,
        racing.bucket(tokens),
        values[0], values[1] * m // n, n, m, str(dtype).removeprefix("torch."),
        torch.get_num_threads() if device.type == "cpu" else 0,
        str(values_dtype).removeprefix("torch.") if wider else "",
        reads_values and keeping and (trains or operands.policy() != "1"),
    )  # fmt: skip
    return choice_for(problem, candidates, device).engine


def choice_for(problem: Problem, candidates: tuple[str, ...], device: torch.device) -> Choice:
    """The choice among ``candidates``: from memory, from disk, or measured now."""
    key = (problem, candidates, str(device))
    if key not in _made:
        choice = _choice(problem, candidates, device)
        if not choice.seconds and len(candidates) > 1:
            return choice  # while a graph was captured: measured the next time
        _made[key] = choice
    return _made[key]


def _choice(problem: Problem, candidates: tuple[str, ...], device: torch.device) -> Choice:
    if len(candidates) == 1:
        return Choice(candidates[0], {})
    entry = json.dumps([*asdict(problem).values(), list(candidates)])
    result = racing.recall(entry, candidates, device)
    if result is None and not racing.can_measure(device):
        return Choice(candidates[0], {})
    if result is None:
        result = racing.run(entry, lambda: _runs(problem, candidates, device), candidates, device)
    return Choice(result.winner, result.seconds)


_made: dict[tuple[Problem, tuple[str, ...], str], Choice] = {}


def choices(d_out: int, d_in: int, n: int, m: int) -> list[tuple[Problem, Choice]]:
    """What was chosen in this process for weights of that size and pattern."""
    size = (d_out, d_in, n, m)
    return [
        (problem, choice)
        for (problem, _, _), choice in list(_made.items())
        if (problem.d_out, problem.d_in, problem.n, problem.m) == size
    ]


def gain(d_out: int, d_in: int, n: int, m: int, training: bool) -> tuple[float, int] | None:
    """How many times faster than dense such a weight's products are together, at their best.

    Args:
        d_out, d_in, n, m: of the weight.
        training: whether it is about all three products, or the forward one alone.

    Returns:
        The factor, and the number of tokens that it was measured for; None if no set of
        products was measured.
    """
    times: dict[tuple[int, str, int, str], dict[str, tuple[float, float]]] = {}
    for (problem, _, device), choice in sorted(_made.items(), key=lambda made: made[0][0].anew):
        size = (problem.d_out, problem.d_in, problem.n, problem.m)
        if size == (d_out, d_in, n, m) and choice.speedup is not None:
            kind = (problem.tokens, problem.dtype, problem.threads, device)
            pair = (choice.seconds["plain"], choice.seconds[choice.engine])
            times.setdefault(kind, {})[problem.op] = pair  # that of a weight that trains is last
    gains: list[tuple[float, int]] = []
    for (tokens, *_), pairs in times.items():
        if "sparse_linear" in pairs and (len(pairs) > 1 or not training):
            counted = list(pairs.values()) if training else [pairs["sparse_linear"]]
            plain, ours = (sum(side) for side in zip(*counted, strict=True))
            gains.append((plain / ours, tokens))
    return max(gains, default=None)


def forget() -> None:
    """Forget the choices of this process; those on disk stay."""
    _made.clear()


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
    if problem.values_dtype:
        values = values.to(getattr(torch, problem.values_dtype))
    forward = pack(_random_mask(d_out, d_in, n, m, generator))
    backward = dense.backward_mask(values, forward, n, m)

    def run(name: str) -> Callable[[], Any]:
        engine = ENGINES[name]
        operation = getattr(engine, problem.op)
        kept = values if name in TAKE_WIDER_VALUES else values.to(dtype)
        arguments = {
            "sparse_linear": (x, kept, forward, None, n, m),
            "sparse_input_grad": (grad, kept, forward, backward, n, m),
            "sparse_weight_grad": (grad, x, forward, n, m),
        }[problem.op]
        if (isinstance(engine, Cusparselt) and problem.anew) or engine is cpu:
            # That of the CPU engine, a transpose, is always part of what is measured.
            made = engine.operands

            def anew() -> Any:
                made.forget(kept)
                return operation(*arguments)

            return anew
        if kept is not values and problem.op == "sparse_linear":
            # Cast once a step; what the gradient uses is this.
            return lambda: operation(x, values.to(dtype), *arguments[2:])
        return lambda: operation(*arguments)

    plain: dict[str, Callable[[], Any]] = {
        "sparse_linear": lambda: torch.nn.functional.linear(x, weight),
        "sparse_input_grad": lambda: grad @ weight,
        "sparse_weight_grad": lambda: grad.t() @ x,
    }
    runs = {name: run(name) for name in candidates}
    return {**_working(runs, problem), "plain": plain[problem.op]}


def _working(runs: dict[str, Callable[[], Any]], problem: Problem) -> dict[str, Callable[[], Any]]:
    """Without those runs that a vendor's library refuses, which is said."""
    working = {}
    for name, thunk in runs.items():
        try:
            if isinstance(ENGINES[name], Cusparselt):
                thunk()
            working[name] = thunk
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise  # says nothing of the engine, and would be kept
            say_once(
                f"slope_fx's {name} engine is not used for {problem.op} of {problem.d_out}x"
                f"{problem.d_in}, {problem.tokens} tokens: {str(error).splitlines()[0]}"
            )
    return working


def _random_mask(d_out: int, d_in: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    rows = min(d_out, 64)
    order = torch.rand(rows, d_in // m, m, generator=generator, device=generator.device).argsort(-1)
    return (order < n).view(rows, d_in).repeat(-(-d_out // rows), 1)[:d_out]
