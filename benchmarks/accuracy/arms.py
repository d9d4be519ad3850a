"""The arms of the study: how each model is made, and the cost of its products."""

from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import slope_fx
from slope_fx.methods import Evolve, Gradual, method_of
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
        return self.layers * sum(d_in * d_out for d_in, d_out in matrices(self.width).values())

    @property
    def tokens(self) -> int:
        return 20 * self.parameters


def inner_width(width: int) -> int:
    """Of the MLP: 8/3 of the width, in multiples of 8."""
    return 8 * round(width / 3)


def matrices(width: int) -> dict[str, tuple[int, int]]:
    """The input and output widths of a block's linears."""
    inner = inner_width(width)
    attention = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
    return {
        **attention, "mlp.gate_proj": (width, inner), "mlp.up_proj": (width, inner),
        "mlp.down_proj": (inner, width),
    }  # fmt: skip


RUNGS = {
    "quick": Rung(2, 64, 8), "small": Rung(4, 80, 8), "medium": Rung(4, 128, 16),
    "large": Rung(6, 192, 32),
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
        exact_from: the fraction of the steps after which the backward pass prunes nothing, by a
            backward mask with all values. Its product is then dense; from 0, it is the bound of
            what a better backward mask can give.
        dense_layers: ``fnmatch`` patterns of layers that stay dense.
        method: as in ``slope_fx.compile``.
        adapter_rate: the learning rate of the adapters divided by that of all other parameters.
        adapter_warmup: the fraction of the steps over which the adapters' rate rises at first.
        pooled: whether A adds up parts of the input of equal size and does not train (SLoRB,
            arXiv 2407.20584), so that B alone costs products.
        scaled: whether the sparse weights begin larger, by density ** -0.5, and have the learning
            rate divided by the density (SuPar, arXiv 2405.15743).
        tuned_from: the first rung on which the learning rate is tuned.
    """

    pattern: str | None = "2:4"
    width: float = 1.0
    mask: str = "magnitude"
    rank: float = 0.0
    start: float = 0.99
    exact_from: float = 1.0
    dense_layers: tuple[str, ...] = ()
    method: str = "slope"
    adapter_rate: float = 1.0
    adapter_warmup: float = 0.0
    pooled: bool = False
    scaled: bool = False
    tuned_from: str = "quick"

    @property
    def density(self) -> float:
        """N/M; 1 for a dense model."""
        return 1.0 if self.pattern is None else Pattern.parse(self.pattern).density


ARMS = {
    "dense": Arm(None),
    "dense-half": Arm(None, width=2**-0.5),
    "slope": Arm(),
    "slope r=1.56% from 99%": Arm(rank=1 / 64),
    "slope r=6.25% from 99%": Arm(rank=1 / 16),
    "slope r=6.25% from 90%": Arm(rank=1 / 16, start=0.9),
    "slope r=6.25% from 90%, rate x8": Arm(
        rank=1 / 16, start=0.9, adapter_rate=8.0, adapter_warmup=0.01
    ),
    "slope r=6.25% from 75%, pooled": Arm(rank=1 / 16, start=0.75, pooled=True),
    "slope r=6.25% from 75%": Arm(rank=1 / 16, start=0.75),
    "slope r=6.25% from 0%": Arm(rank=1 / 16, start=0.0),
    "random mask": Arm(mask="random"),
    "transposable": Arm(mask="transposable"),
    "transposable r=6.25% from 75%": Arm(mask="transposable", rank=1 / 16, start=0.75),
    "exact backward": Arm(exact_from=0.0),
    "exact backward from 95%": Arm(exact_from=0.95),
    "scaled": Arm(scaled=True),
    "transposable scaled": Arm(mask="transposable", scaled=True),
    "evolve": Arm(method="evolve"),
    "sr-ste": Arm(method="sr-ste"),
    "s-ste": Arm(method="s-ste"),
    "gradual": Arm(method="gradual"),
    "MLP only": Arm(dense_layers=("*.self_attn.*",)),
    "first and last block dense": Arm(
        dense_layers=("*.layers.0.*", "*.layers.LAST.*"), tuned_from="small"
    ),
    "slope 1:4": Arm("1:4"),
    "transposable 1:4": Arm("1:4", mask="transposable"),
    "exact backward 1:4": Arm("1:4", exact_from=0.0),
}
"""By name. The first is the reference of the gap, the third its other end."""


def trunk_of(name: str) -> tuple[str, float] | None:
    """The arm that has the same first steps, and the fraction of the steps that they share."""
    arm = ARMS[name]
    shared = min(arm.start if arm.rank else 1.0, arm.exact_from)
    plain = replace(
        arm, rank=0.0, start=Arm.start, exact_from=1.0, adapter_rate=1.0, adapter_warmup=0.0,
        pooled=False,
    )  # fmt: skip
    if 0 < shared < 1:
        return next(((other, shared) for other, found in ARMS.items() if found == plain), None)
    return None


def width_of(arm: Arm, rung: Rung) -> int:
    """The width of a model: of a smaller dense one, the nearest multiple of 8."""
    return rung.width if arm.width == 1.0 else round(arm.width * rung.width / 8) * 8


def make(arm: Arm, rung: Rung, context: int, steps: int) -> tuple[nn.Module, Any]:
    """The model of an arm, and its schedule; None for a dense one."""
    width = width_of(arm, rung)
    config = LlamaConfig(
        num_hidden_layers=rung.layers, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        hidden_size=width, intermediate_size=inner_width(width), vocab_size=256,
        max_position_embeddings=context, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0, pad_token_id=None, initializer_range=0.01 * (768 / width) ** 0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if arm.pattern is None:
        return slope_fx.compile(model, method="dense", region="blocks"), None
    layers = [name.replace("LAST", str(rung.layers - 1)) for name in arm.dense_layers]
    model = slope_fx.compile(
        model, {**dict.fromkeys(layers), "*": arm.pattern}, mask=arm.mask, region="blocks",
        adapter_rank=arm.rank or None, adapter_init=_pooling if arm.pooled else "zero",
        skip_first=False, method=arm.method,
        engine="dense" if arm.exact_from < 1 else "auto",
    )  # fmt: skip
    weights = list(slope_fx.sparse_weights(model).values())
    for weight in weights if arm.pooled else ():
        assert weight.lora_A is not None
        weight.lora_A.requires_grad_(False)
    if arm.scaled:
        for weight in weights:
            weight.values.data.mul_(arm.density**-0.5)
            weight.note_write()
    return model, slope_fx.Schedule(model, steps, arm.start if arm.rank else 0.99)


def _pooling(name: str, weight: Tensor, mask: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A, whose rows add up parts of the input of equal size, and B = 0."""
    parts = torch.arange(weight.shape[1]) * rank // weight.shape[1]
    a = (parts == torch.arange(rank)[:, None]).to(weight.dtype)
    return a, weight.new_zeros(weight.shape[0], rank)


def set_backward(arm: Arm, model: nn.Module, step: int, steps: int) -> None:
    """Let the next backward pass prune nothing, if the arm says so."""
    if step >= arm.exact_from * steps and arm.exact_from < 1:
        for weight in slope_fx.sparse_weights(model).values():
            weight.backward_bits.data.fill_(255)


def own_rates(arm: Arm, rate: float, steps: int) -> dict[str, Any]:
    """What ``param_groups`` is given for the learning rates of an arm."""
    rates: dict[str, Any] = {}
    if arm.scaled:
        rates["sparse_lr"] = rate / arm.density
    if arm.adapter_rate != 1:
        rates["adapter_lr"] = rate * arm.adapter_rate
    if arm.adapter_warmup:
        rates["adapter_warmup"] = round(arm.adapter_warmup * steps)
    return rates


def cost(arm: Arm, rung: Rung) -> float:
    """The FLOPs of the blocks' products over a run, relative to dense.

    A sparse layer computes N/M of each of its three products. A product that is dense, in some
    steps or in all, counts in full there. An adapter of rank r adds r (d_in + d_out) /
    (d_in d_out) of dense while it takes part; one whose A is a sum adds r / d_in.
    """
    if arm.pattern is None:
        return replace(rung, width=width_of(arm, rung)).parameters / rung.parameters
    kept, dense = arm.density, _dense_shares(arm)
    products = sum(share + (1 - share) * kept for share in dense) / 3
    total = 0.0
    for block in range(rung.layers):
        for name, (d_in, d_out) in matrices(rung.width).items():
            share = d_in * d_out / rung.parameters
            if _is_dense(arm, rung, f"model.layers.{block}.{name}"):
                total += share
                continue
            factors = d_out if arm.pooled else d_in + d_out
            adapter = arm.rank * factors / d_out * (1 - arm.start)
            total += share * (products + adapter)
    return total


def _dense_shares(arm: Arm) -> tuple[float, float, float]:
    """The share of the steps with a dense product: forward, input and weight gradient."""
    method = method_of(arm.method)
    if isinstance(method, Evolve):
        return (method.end / method.interval,) * 3
    if isinstance(method, Gradual):
        return (method.end,) * 3
    if not method.compressed:
        return 0.0, 1.0, 1.0
    return 0.0, 1.0 - arm.exact_from, 0.0


def _is_dense(arm: Arm, rung: Rung, name: str) -> bool:
    patterns = [p.replace("LAST", str(rung.layers - 1)) for p in arm.dense_layers]
    return any(fnmatch(name, pattern) for pattern in patterns)
