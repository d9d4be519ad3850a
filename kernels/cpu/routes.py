"""The routes of the product of a frozen weight, and the choice among them by measurement."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slope_fx.kernels import racing
from slope_fx.kernels.packing import packed_width

STREAM, PANELS, DENSE = 0, 1, 2
"""STREAM reads the weight once for every 8 tokens. PANELS computes with N/M of the dense work.
DENSE expands the weight, and computes the product with PyTorch's kernels."""
NAMES = {STREAM: "stream", PANELS: "panels", DENSE: "dense"}
MOST_STREAMED, MOST_STREAMED_CODES = 16, 32
"""The largest number of tokens of STREAM, with values and with codes."""
FEWEST_ROWS = 4
"""The fewest rows of a weight for STREAM, as in frozen.h."""
TOKENS = (1, 2, 4, 8, 16, 17, 32, 64, 512)
"""The numbers of tokens that are measured. A call uses the route of the next smaller one."""

FORM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes in the order of their codes in the argument ``form`` of the ops."""

Run = Callable[[Tensor, list[int]], Any]


@dataclass(frozen=True)
class Product:
    """The product of a frozen weight.

    Attributes:
        d_out, d_in: size of the linear.
        n, m: the N:M pattern.
        dtype: dtype of the inputs.
        rank: rank of the adapter, 0 without one.
        bits, group: of quantised values: bits of a code, and values that share a scale. 0, 0 for
            values in the dtype of the inputs.
    """

    d_out: int
    d_in: int
    n: int
    m: int
    dtype: torch.dtype
    rank: int = 0
    bits: int = 0
    group: int = 0


def form_of(product: Product, routes: tuple[int, ...] = ()) -> list[int]:
    """The argument ``form`` of the ops."""
    head = [product.n, product.m, product.bits, product.group]
    return [*head, FORM_DTYPES.index(product.dtype), product.d_in, *(routes or (0, DENSE))]


def allowed_routes(product: Product, engines: tuple[str, ...]) -> tuple[int, ...]:
    """The routes that the allowed engines and the size of the product leave."""
    sparse = [] if product.d_out < FEWEST_ROWS and not product.bits else [STREAM]
    sparse += [] if product.bits else [PANELS]
    dense = [DENSE] if {"dense", "cpu-dense"} & set(engines) else []
    return tuple((sparse if "cpu" in engines else []) + dense) or (DENSE,)


def measured_routes(
    product: Product, allowed: tuple[int, ...], prepare: Callable[[Product], Run]
) -> tuple[int, ...]:
    """Pairs (fewest tokens, route) of the fastest routes.

    Args:
        product: the product.
        allowed: the routes to choose from.
        prepare: makes a random weight, and returns a function that runs the op with it.
    """
    pairs: list[int] = []
    # Made in a race, where the random state of the user is kept.
    run = functools.cache(lambda: prepare(product))
    for tokens in TOKENS:
        most = MOST_STREAMED_CODES if product.bits else MOST_STREAMED
        open_to = [r for r in allowed if r != STREAM or tokens <= most]
        open_to = open_to or [DENSE]
        best = open_to[0]
        if len(open_to) > 1:
            names = tuple(NAMES[r] for r in open_to)
            entry = f"frozen {product} {tokens} {torch.get_num_threads()}"
            device = torch.device("cpu")
            result = racing.recall(entry, names, device)
            if result is None:
                result = racing.run(entry, _runs(product, run, tokens, open_to), names, device)
            best = next(r for r in open_to if NAMES[r] == result.winner)
        if not pairs or pairs[-1] != best:
            pairs += [tokens if pairs else 0, best]
    return tuple(pairs)


def _runs(
    product: Product, run: Callable[[], Run], tokens: int, routes: list[int]
) -> Callable[[], Mapping[str, Callable[[], Any]]]:
    def prepare() -> Mapping[str, Callable[[], Any]]:
        x = torch.randn(tokens, product.d_in).to(product.dtype)

        def runner(route: int) -> Callable[[], Any]:
            form = form_of(product, (0, route))
            return lambda: run()(x, form)

        return {NAMES[route]: runner(route) for route in routes}

    return prepare


def random_mask(d_out: int, d_in: int, n: int, m: int) -> Tensor:
    """A packed N:M mask that keeps the first values of each group."""
    kept = torch.arange(packed_width(d_in) * 8) % m < n
    kept[d_in:] = False
    bits = kept.view(-1, 8).to(torch.uint8) << torch.arange(8)
    return bits.sum(1).to(torch.uint8).expand(d_out, -1).contiguous()
