"""What hypothesis draws: patterns, sizes, dtypes, and weights with awkward values."""

import math

import torch
from hypothesis import strategies as st

from slope_fx.planning.patterns import GROUP_SIZES, Pattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

patterns = st.sampled_from(GROUP_SIZES).flatmap(
    lambda m: st.integers(1, m - 1).map(lambda n: Pattern(n, m))
)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31 - 1)
tokens = st.sampled_from([(1,), (7,), (2, 3), (1, 1), (0,), (), (3, 1, 5)])
"""Leading shapes of an input: odd counts, one token, none, a lone vector."""


@st.composite
def sizes(draw, pattern: Pattern) -> tuple[int, int]:
    """(d_out, d_in), each a few groups: widths that are and aren't whole bytes."""
    return draw(st.integers(1, 5)) * pattern.m, draw(st.integers(1, 9)) * pattern.m


@st.composite
def weights(draw, shape: tuple[int, int], dtype: torch.dtype, special: bool = True):
    """A weight; with ``special`` also one of few distinct values (ties), zeros, NaN and inf."""
    generator = torch.Generator().manual_seed(draw(seeds))
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    if special:
        kind = draw(st.sampled_from(["plain", "ties", "zeros", "extreme"]))
        if kind == "ties":
            weight = weight.round()
        elif kind == "zeros":
            weight = weight * (torch.rand(shape, generator=generator) < 0.3)
        elif kind == "extreme":
            values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0])
            picks = torch.randint(len(values), shape, generator=generator)
            weight = values.double()[picks]
    return weight.to(dtype)


def normal(shape, seed: int, dtype: torch.dtype = torch.float32, contiguous: bool = True):
    """Normal draws; with ``contiguous=False`` a view with gaps between its elements."""
    generator = torch.Generator().manual_seed(seed)
    if contiguous or not shape:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    wide = (*shape[:-1], 2 * shape[-1])
    return torch.randn(wide, generator=generator, dtype=torch.float64).to(dtype)[..., ::2]
