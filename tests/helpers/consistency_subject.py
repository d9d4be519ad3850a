"""What ``consistency.py`` compares: an architecture in one phase and dtype, with its inputs."""

import copy
import functools
import zlib
from typing import Any

import torch
from torch import nn

import slope_fx
from architectures import cast, choose_all_experts, inputs_of, made, plain_experts, shaken
from formulas import FormulaModel, formula_model

PHASES = ("sparse", "adapter")
RANK = 4
Inputs = dict[str, Any]


class Subject:
    """An architecture in one phase and dtype, with the inputs that it is compared on.

    Attributes:
        dense: the model, not compiled, no parameter of it zero or one.
        inputs: of the usual case.
        autocast: whether it runs under bf16 autocast.
        kept: the dtype of its parameters.
        rough: whether gradients are compared by their norms.
    """

    def __init__(self, architecture: str, phase: str, dtype: str = "fp32") -> None:
        torch.manual_seed(0)
        self.architecture, self.phase, self.dtype = architecture, phase, dtype
        self.dense = shaken(made(architecture)).train()
        if dtype != "fp32":
            choose_all_experts(self.dense)
        if hasattr(self.dense, "loss_type"):  # a model of transformers
            self.dense.config.use_cache = False
        self.autocast, self.rough = dtype == "autocast", dtype != "fp32"
        self.kept = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.dense.to(self.kept)
        self.inputs = cast(inputs_of(self.dense), self.kept)

    def compiled(self, **how: Any) -> nn.Module:
        """The model, compiled, in its phase, with large adapters, awake or asleep."""
        how = {"on_fallback": "error", "skip_first": False, **how}
        model = slope_fx.compile(
            copy.deepcopy(self.dense), adapter_rank=RANK, example_inputs=self.inputs, **how
        )
        for weight in slope_fx.sparse_weights(model).values():
            enlarge_adapter(weight)
        self.schedule(model)
        return model

    def schedule(self, model: nn.Module) -> slope_fx.Schedule:
        start = 0.0 if self.phase == "adapter" else 1.0
        return slope_fx.Schedule(model, 100, adapter_start=start, backward_mask_interval=1)

    @functools.cached_property
    def source(self) -> nn.Module:
        """What the oracle takes weights and masks from."""
        return self.compiled(backend=None)

    def oracle(self, once: bool = False) -> FormulaModel:
        """METHOD's formulas in float64; ``once``: with the input gradient of ``W^R``."""
        oracle = formula_model(plain_experts(copy.deepcopy(self.dense)), self.source)
        if once:
            oracle.twice_pruned = {name: mask for name, (_, mask, *_) in oracle.layers.items()}
        return oracle


@torch.no_grad()
def enlarge_adapter(weight: Any) -> None:
    """Random, and as large as the weight that it is added to; the same for each road."""
    generator = torch.Generator().manual_seed(zlib.crc32(weight.name.encode()))
    a = torch.randn(weight.lora_A.shape, generator=generator)
    b = torch.randn(weight.lora_B.shape, generator=generator)
    product = torch.bmm(
        b.view(weight.stack, -1, weight.rank), a.view(weight.stack, weight.rank, -1)
    )
    b *= weight.to_dense().float().norm() / (weight.scale * product.norm())
    weight.lora_A.copy_(a), weight.lora_B.copy_(b)
