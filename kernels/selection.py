"""The choice of the engine for a product: the fastest by measurement, or the named engine.

A :class:`Request` describes a product of a layer. A :class:`Problem` has the properties that its
time depends on. The first time a problem occurs, the engines that support it compute it in turns on
random data. The best time of each engine decides. The result is kept on disk beside the compiled
kernels, so that a machine measures each problem once.

The dense product of a dense weight, "plain", is measured too. It takes no part in the choice; the
speedup is relative to it. The time of an engine that makes an operand from the weight includes this
work, unless the operand is kept for all uses.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from slope_fx.kernels import conversions, operands, racing
from slope_fx.kernels.engines import AUTO, ENGINES, engines_for, engines_taking, say_once
from slope_fx.kernels.modes import undisturbed
from slope_fx.kernels.packing import pack

PRODUCTS = ("sparse_linear", "sparse_input_grad", "sparse_weight_grad")


@dataclass(frozen=True)
class Request:
    """The products of a layer, for which engines are chosen.

    Attributes:
        tokens: rows of the input.
        d_out, d_in: size of the dense weight.
        n, m: the pattern.
        dtype, device: of the product.
        values_dtype: dtype of the values; None: ``dtype``.
        trains: whether the values change between two uses.
        engines: the allowed engines, as in :func:`engines.allowed_engines`.
    """

    tokens: int
    d_out: int
    d_in: int
    n: int
    m: int
    dtype: torch.dtype
    device: torch.device
    values_dtype: torch.dtype | None = None
    trains: bool = True
    engines: str = AUTO


@dataclass(frozen=True)
class Problem:
    """The properties of a product that its time depends on: the key of a measurement.

    Attributes:
        op: one of :data:`PRODUCTS`.
        tokens: rows of the input, rounded up to a power of two.
        d_out, d_in: size of the dense weight.
        n, m: the pattern.
        dtype: of the product, for example "float32".
        threads: threads of PyTorch on a CPU; 0 on other devices.
        values_dtype: dtype of the values if it is wider than ``dtype``, as under autocast; or "".
        makes_operand: whether a candidate makes an operand of the weight at each use. This is so
            for a weight that trains, and for all weights unless all operands are kept.
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
    makes_operand: bool = False

    @classmethod
    def of(cls, op: str, request: Request) -> "Problem":
        """The problem of a product of a request."""
        return cls._among(op, request, _candidates(op, request))

    @classmethod
    def _among(cls, op: str, request: Request, candidates: tuple[str, ...]) -> "Problem":
        reads_values = op != "sparse_weight_grad"
        wider = reads_values and request.values_dtype not in (None, request.dtype)
        keeping = any(ENGINES[name].keeps_operands for name in candidates)
        return cls(
            op,
            racing.bucket(request.tokens),
            request.d_out,
            request.d_in,
            request.n,
            request.m,
            _name_of(request.dtype),
            torch.get_num_threads() if request.device.type == "cpu" else 0,
            values_dtype=_name_of(request.values_dtype) if wider else "",
            makes_operand=(
                reads_values and keeping and (request.trains or operands.policy() != "1")
            ),
        )


def _name_of(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Choice:
    """The engine for a problem.

    Attributes:
        engine: its name.
        seconds: the best time of each engine, and under "plain" that of the dense product with a
            dense weight. Empty if nothing was measured.
    """

    engine: str
    seconds: dict[str, float]

    @property
    def speedup(self) -> float | None:
        """The speedup relative to the plain dense product; None if nothing was measured."""
        plain = self.seconds.get("plain")
        return None if plain is None else plain / self.seconds[self.engine]


def choose(op: str, request: Request) -> str:
    """The name of the engine for a product. It is measured first if this is necessary.

    Args:
        op: one of :data:`PRODUCTS`.
        request: the layer, the tokens and the allowed engines.
    """
    return chosen(op, request).engine


def chosen(op: str, request: Request) -> Choice:
    """The engine for a product and the measured times: from memory, from disk, or measured now."""
    candidates = _candidates(op, request)
    device = request.device
    if device.type == "cuda" and racing.can_measure(device):
        # Otherwise the tables can be made in the memory of a CUDA graph, and stay in it.
        with undisturbed():
            conversions.make_tables(request.n, request.m, device)
    problem = Problem._among(op, request, candidates)
    key = (problem, candidates, str(device))
    if key not in _made:
        choice = _choice(problem, candidates, device)
        if not choice.seconds and len(candidates) > 1:
            return choice  # during the capture of a graph; the next request is measured
        _made[key] = choice
    return _made[key]


def _candidates(op: str, request: Request) -> tuple[str, ...]:
    able = engines_for(request.device, request.dtype, request.engines)
    return engines_taking(op, request.n, request.m, able)


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
"""The choices of this process, by problem, candidates and device."""


def forget() -> None:
    """Forget the choices of this process, but not those on disk."""
    _made.clear()


def gain(pairs: Iterable[tuple[Problem, Choice]], training: bool) -> tuple[float, int] | None:
    """The best speedup of the products of a weight, taken together, relative to dense products.

    Args:
        pairs: problems of weights of one size and pattern, and the choices for them.
        training: whether to count all three products, or the forward product alone.

    Returns:
        The speedup and the number of tokens for which it was measured, or None if no set of
        products was measured.
    """
    times: dict[tuple[int, str, int], dict[str, tuple[float, float]]] = {}
    # The problems of weights that train come last, and replace others of the same kind.
    for problem, choice in sorted(pairs, key=lambda pair: pair[0].makes_operand):
        if choice.speedup is not None:
            kind = (problem.tokens, problem.dtype, problem.threads)
            both = (choice.seconds["plain"], choice.seconds[choice.engine])
            times.setdefault(kind, {})[problem.op] = both
    gains: list[tuple[float, int]] = []
    for (tokens, *_), by_op in times.items():
        if "sparse_linear" in by_op and (len(by_op) > 1 or not training):
            counted = list(by_op.values()) if training else [by_op["sparse_linear"]]
            plain, ours = (sum(side) for side in zip(*counted, strict=True))
            gains.append((plain / ours, tokens))
    return max(gains, default=None)


# --- measurements --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """Random tensors of a problem.

    Attributes:
        x: (tokens, d_in).
        grad: (tokens, d_out).
        values: (d_out, d_in * N / M).
        weight: a dense (d_out, d_in), for the plain product.
        forward, backward: the packed masks of the values.
    """

    x: Tensor
    grad: Tensor
    values: Tensor
    weight: Tensor
    forward: Tensor
    backward: Tensor

    @classmethod
    def of(cls, problem: Problem, device: torch.device) -> "_Data":
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
        backward = conversions.backward_mask(values, forward, n, m)
        return cls(x, grad, values, weight, forward, backward)


def _runs(
    problem: Problem, candidates: tuple[str, ...], device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Functions that compute the product by each candidate, and by "plain", on random data."""
    data = _Data.of(problem, device)
    plain: dict[str, Callable[[], Any]] = {
        "sparse_linear": lambda: torch.nn.functional.linear(data.x, data.weight),
        "sparse_input_grad": lambda: data.grad @ data.weight,
        "sparse_weight_grad": lambda: data.grad.t() @ data.x,
    }
    runs = {name: _run(name, problem, data) for name in candidates}
    return {**_working(runs, problem), "plain": plain[problem.op]}


def _run(name: str, problem: Problem, data: _Data) -> Callable[[], Any]:
    """A function that computes the product by an engine."""
    engine, n, m = ENGINES[name], problem.n, problem.m
    x, grad, forward, backward = data.x, data.grad, data.forward, data.backward
    values = engine.values_for(data.values, x.dtype)
    product: dict[str, Callable[[], Any]] = {
        # A step casts the values once, here. The input gradient uses the cast values.
        "sparse_linear": lambda: engine.sparse_linear(
            x, engine.values_for(data.values, x.dtype), forward, None, n, m
        ),
        "sparse_input_grad": lambda: engine.sparse_input_grad(
            grad, values, forward, backward, n, m
        ),
        "sparse_weight_grad": lambda: engine.sparse_weight_grad(grad, x, forward, n, m),
    }
    compute, kept = product[problem.op], engine.operands
    if kept is None or (engine.keeps_operands and not problem.makes_operand):
        return compute

    def with_operand() -> Any:
        kept.forget(values)
        return compute()

    return with_operand


def _working(runs: dict[str, Callable[[], Any]], problem: Problem) -> dict[str, Callable[[], Any]]:
    """The runs without those that a library refuses. A warning names each of these."""
    working = {}
    for name, run in runs.items():
        try:
            if ENGINES[name].may_refuse:
                run()
            working[name] = run
        except torch.OutOfMemoryError:
            raise  # not a property of the engine, so that it must not be kept
        except RuntimeError as error:
            say_once(
                f"slope_fx does not use the {name} engine for {problem.op} of {problem.d_out}x"
                f"{problem.d_in}, {problem.tokens} tokens: {str(error).splitlines()[0]}"
            )
    return working


def _random_mask(d_out: int, d_in: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    """A random N:M mask, bool (d_out, d_in)."""
    rows = min(d_out, 64)
    order = torch.rand(rows, d_in // m, m, generator=generator, device=generator.device).argsort(-1)
    return (order < n).view(rows, d_in).repeat(-(-d_out // rows), 1)[:d_out]
