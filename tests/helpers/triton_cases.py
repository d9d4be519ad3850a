"""Weights and configurations to test the Triton engine with.

The kernels run in Triton's interpreter, or on the GPU where there is one.
"""

import contextlib
import dataclasses

import torch
from hypothesis import strategies as st

from slope_fx.kernels import ENGINES
from slope_fx.kernels.triton import tuning
from slope_fx.planning.patterns import Pattern
from strategies import patterns, weights

triton = ENGINES["triton"]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = st.sampled_from(DTYPES)
# The fast path as often as all the others together; groups of 16 take the interpreter seconds.
# On a GPU each pattern is compiled, a second a kernel, so there a few stand for all.
few = st.sampled_from([Pattern(*pair) for pair in ((2, 4), (1, 2), (2, 8), (3, 8), (8, 16))])
common = few if ON_GPU else st.one_of(st.just(Pattern(2, 4)), patterns)
numbers = st.integers(0, 3)
tokens = st.sampled_from([1, 2, 7, 16, 17, 33, 65, 130])
why_not = triton.why_not(DEVICE, torch.float32)


@contextlib.contextmanager
def configuration(number: int):
    """Every kernel with the configuration of that number in its space.

    The interpreter's time is by instruction, whatever the tile: it gets programs of more rows, and
    fewer of them.
    """
    before = tuning.best

    def best(kernel, key, space, run, device):
        config = space[number % len(space)]
        if kernel in ("magnitude_mask", "expand", "compress") and not ON_GPU:
            blocks = {**dict(config.blocks), "BLOCK_OUT": 64}
            config = dataclasses.replace(config, blocks=tuple(blocks.items()))
        return config

    tuning.best = best
    try:
        yield
    finally:
        tuning.best = before


def pruned(weight: torch.Tensor, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept values and the forward mask of a weight, by the engine."""
    forward = triton.magnitude_mask(weight, n, m)
    return triton.compress(weight, forward, n, m), forward


@st.composite
def sizes(draw, pattern: Pattern):
    """(d_out, d_in): a few groups, whole bytes of masks or not, tiles of the kernels or not."""
    groups = st.sampled_from([1, 2, 3, 5, 9] if pattern.m > 4 else [1, 2, 3, 5, 9, 17, 33])
    return draw(groups) * pattern.m, draw(groups) * pattern.m


@st.composite
def layers(draw, special: bool = False):
    """A compressed weight on the device: pattern, values, both masks."""
    pattern, dtype = draw(common), draw(dtypes)
    n, m = pattern.n, pattern.m
    weight = draw(weights(draw(sizes(pattern)), dtype, special=special))
    forward = ENGINES["dense"].magnitude_mask(weight, n, m)
    values = ENGINES["dense"].compress(weight, forward, n, m)
    backward = ENGINES["dense"].backward_mask(values, forward, n, m)
    return n, m, *(t.to(DEVICE) for t in (values, forward, backward))
