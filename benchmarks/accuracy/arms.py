"""The arms of the study: how each model is made, and the cost of its products."""

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import slope_fx
from slope_fx.planning.patterns import Pattern

HEADS = 4


@dataclass(frozen=True)
class Rung:
    """A size of model. PROTOCOL.md has the table."""

    layers: int
    width: int
    batch: int

    @property
    def parameters(self) -> int:
        """The parameters of the blocks' matrices, dense."""
        return 12 * self.layers * self.width**2

    @property
    def tokens(self) -> int:
        return 20 * self.parameters


RUNGS = {
    "quick": Rung(2, 64, 32), "small": Rung(4, 80, 32), "medium": Rung(4, 128, 32),
    "large": Rung(6, 192, 64),
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A way to train a model.

    Attributes:
        pattern: N:M of all linears of the blocks, or None for a dense model.
        width: of a dense model, relative to the rung's.
        mask: as in ``slope_fx.compile``.
        rank: of the adapters, as a fraction of a layer's input width; 0 for none.
        start: the fraction of the steps before the adapters.
        exact: whether the backward pass prunes nothing, by a backward mask with all values. It
            computes a dense product: the bound of what a better backward mask can give.
        dense_layers: ``fnmatch`` patterns of layers that stay dense.
    """

    pattern: str | None = "2:4"
    width: float = 1.0
    mask: str = "magnitude"
    rank: float = 0.0
    start: float = 0.99
    exact: bool = False
    dense_layers: tuple[str, ...] = ()


ARMS = {
    "dense": Arm(None),
    "dense-half": Arm(None, width=2**-0.5),
    "slope": Arm(),
    "slope r=1.56% from 99%": Arm(rank=1 / 64),
    "slope r=6.25% from 99%": Arm(rank=1 / 16),
    "slope r=6.25% from 90%": Arm(rank=1 / 16, start=0.9),
    "slope r=6.25% from 75%": Arm(rank=1 / 16, start=0.75),
    "slope r=6.25% from 0%": Arm(rank=1 / 16, start=0.0),
    "random mask": Arm(mask="random"),
    "transposable": Arm(mask="transposable"),
    "transposable r=6.25% from 75%": Arm(mask="transposable", rank=1 / 16, start=0.75),
    "exact backward": Arm(exact=True),
    "MLP only": Arm(dense_layers=("*.attn.*",)),
    "first and last block dense": Arm(dense_layers=("*.h.0.*", "*.h.LAST.*")),
    "slope 1:4": Arm("1:4"),
    "transposable 1:4": Arm("1:4", mask="transposable"),
    "exact backward 1:4": Arm("1:4", exact=True),
}
"""By name. The first is the reference of the gap, the third its other end."""


def width_of(arm: Arm, rung: Rung) -> int:
    """The width of a model: of a smaller dense one, the nearest multiple of 8."""
    return rung.width if arm.width == 1.0 else round(arm.width * rung.width / 8) * 8


def make(arm: Arm, rung: Rung, context: int, steps: int) -> tuple[nn.Module, Any]:
    """The model of an arm, and its schedule; None for a dense one."""
    width = width_of(arm, rung)
    config = GPT2Config(
        n_layer=rung.layers, n_head=HEADS, n_embd=width, vocab_size=256, n_positions=context,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    if arm.pattern is None:
        for block in model.transformer.h:
            block.compile()
        return model, None
    layers = [name.replace("LAST", str(rung.layers - 1)) for name in arm.dense_layers]
    model = slope_fx.compile(
        model, {**dict.fromkeys(layers), "*": arm.pattern}, mask=arm.mask, region="blocks",
        adapter_rank=arm.rank or None, skip_first=False, engine="dense" if arm.exact else "auto",
    )  # fmt: skip
    if arm.exact:
        for weight in slope_fx.sparse_weights(model).values():
            weight.backward_bits.data.fill_(255)
    interval = None if arm.exact else 100
    return model, slope_fx.Schedule(model, steps, arm.start if arm.rank else 0.99, interval)


def cost(arm: Arm, rung: Rung) -> float:
    """The FLOPs of the blocks' products over a run, relative to dense.

    A sparse layer computes N/M of each of its three products. The dense backward product of an
    exact one counts in full. An adapter of rank r adds r (d_in + d_out) / (d_in d_out) of dense
    while it takes part.
    """
    width = width_of(arm, rung)
    if arm.pattern is None:
        return width**2 / rung.width**2
    pattern = Pattern.parse(arm.pattern)
    kept = pattern.n / pattern.m
    layers = {
        "attn.c_attn": (1, 3),
        "attn.c_proj": (1, 1),
        "mlp.c_fc": (1, 4),
        "mlp.c_proj": (4, 1),
    }
    total = 0.0
    for block in range(rung.layers):
        for name, (d_in, d_out) in layers.items():
            share = d_in * d_out / 12 / rung.layers
            if _is_dense(arm, rung, f"transformer.h.{block}.{name}"):
                total += share
                continue
            adapter = arm.rank * (d_in + d_out) / d_out * (1 - arm.start)
            total += share * ((2 * kept + (1.0 if arm.exact else kept)) / 3 + adapter)
    return total


def _is_dense(arm: Arm, rung: Rung, name: str) -> bool:
    patterns = [p.replace("LAST", str(rung.layers - 1)) for p in arm.dense_layers]
    return any(fnmatch(name, pattern) for pattern in patterns)
