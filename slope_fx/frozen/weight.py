"""``FrozenWeight``: the values, the mask and the adapter of one weight of a frozen model."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slope_fx.errors import StateError, UnsupportedError
from slope_fx.kernels.cpu.routes import FORM_DTYPES
from slope_fx.kernels.packing import unpack
from slope_fx.ops.frozen import FROZEN_EXPAND, FROZEN_LINEAR, FROZEN_LINEAR_WITH_GRAD
from slope_fx.planning.patterns import Pattern
from slope_fx.planning.plan import SparsePlan, values_name
from slope_fx.sparse.blank import Start
from slope_fx.sparse.mask import Mask, classes_kept
from slope_fx.sparse.reading import DenseWeight
from slope_fx.sparse.wrappers import refuse_data_parallel

UNFROZEN = (
    "A frozen model is for inference: train the compiled model, or load its checkpoint without "
    "frozen=True. Adapters of PEFT train on top of a frozen model."
)


class Kept(nn.Parameter):
    """A parameter of a frozen weight. It can't require gradients.

    Raises:
        UnsupportedError: if ``requires_grad`` is set.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> "Kept":
        return super().__new__(cls, data, requires_grad=False)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value:
            raise UnsupportedError(
                f"gradients were asked of a weight {tuple(self.shape)} of a frozen model. "
                f"{UNFROZEN}"
            )

    def requires_grad_(self, requires_grad: bool = True) -> "Kept":
        self.requires_grad = requires_grad
        return self


class FrozenWeight(nn.Module):
    """The submodule ``weight_sparse`` of a layer of a frozen model.

    It has the place and the names of a :class:`~slope_fx.SparseWeight`, without what training
    needs. Nothing in it requires gradients.

    Attributes:
        name: qualified name of the layer.
        n, m: the N:M pattern.
        d_out, d_in: size of the linear.
        stack: number of linears in the weight, such as the experts of a mixture.
        layout: layout of the dense weight in the layer.
        forward_bits: uint8 (stack * d_out, ceil(d_in / 8)), one bit per element.
        lora_A, lora_B: (stack * r, d_in) and (stack * d_out, r), or None. The scale is in
            ``lora_B``.
        scales: bf16, the scales of quantised values, or None (``kernels/quantised.py``).
        form: as in ``ops/frozen.py``: a tuple of numbers.
    """

    forward_bits: nn.Parameter
    lora_A: nn.Parameter | None  # noqa: N815
    lora_B: nn.Parameter | None  # noqa: N815
    scales: nn.Parameter | None
    start: Start | None = None
    scale = 1.0
    expanded_because = None

    def __init__(
        self,
        plan: SparsePlan,
        owner: nn.Module,
        attribute: str,
        forward_bits: Tensor,
        scales: Tensor | None,
        adapter: tuple[Tensor, Tensor] | None,
        form: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.name, self.layout, self.form = plan.name, plan.layout, form
        self.n, self.m = plan.pattern.n, plan.pattern.m
        self.stack, self.d_out, self.d_in = plan.layout.stack, plan.layout.d_out, plan.layout.d_in
        # In a tuple, so that the layer does not become a submodule of this module.
        self._owner = (owner,)
        self.holders: list[tuple[nn.Module, str]] = []
        self._values_name = values_name(attribute)
        self.forward_bits = Mask(forward_bits)
        self.scales = None if scales is None else Kept(scales)
        a, b = (None, None) if adapter is None else adapter
        self.lora_A = None if a is None else Kept(a)
        self.lora_B = None if b is None else Kept(b)

    @property
    def pattern(self) -> Pattern:
        """The N:M pattern."""
        return Pattern(self.n, self.m)

    @property
    def values(self) -> nn.Parameter:
        """The values (stack * d_out, d_in * N / M), or their codes."""
        return self._owner[0]._parameters[self._values_name]  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weight."""
        return self.values.dtype if self.scales is None else FORM_DTYPES[self.form[4]]

    @property
    def rank(self) -> int | None:
        """The rank of the adapter, or None without one."""
        return None if self.lora_B is None else self.lora_B.shape[1]

    @property
    def adapter_active(self) -> bool:
        """Whether the weight has an adapter. A frozen adapter is always active."""
        return self.lora_B is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_out, d_in), or (stack, d_out, d_in)."""
        return (self.d_out, self.d_in) if self.stack == 1 else (self.stack, self.d_out, self.d_in)

    def forward_mask(self) -> Tensor:
        """The forward mask: bool, in the shape :attr:`shape`."""
        return unpack(self.forward_bits, self.d_in).view(self.shape)

    def backward_mask(self) -> NoReturn:
        """Raises StateError: a frozen model has no backward masks."""
        raise StateError(f"{self.name}: a frozen model has no backward masks. {UNFROZEN}")

    def write_(self, dense: Tensor) -> NoReturn:
        """Raises StateError: a frozen weight can't be written."""
        self.store(dense)

    def store(self, matrix: Tensor) -> NoReturn:
        """Raises StateError, as :meth:`write_`."""
        raise StateError(f"{self.name}: the weight of a frozen model can't be written. {UNFROZEN}")

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """A copy of ``W^R`` in the shape :attr:`shape`, without the adapter."""
        return self._dense(self.values, adapter=False).view(self.shape)

    def expanded(self) -> Tensor:
        """The current content of ``weight``, (stack * d_out, d_in), without autograd."""
        return self._dense(self.values, adapter=True)

    def has_pruned(self, matrix: Tensor) -> bool:
        """As in SparseWeight."""
        return False  # every write is refused by store

    def share(self) -> None:
        """Let all modules that share the weight have the values of its owner."""
        for module, name in self.holders:
            module._parameters[name] = self.values

    def product(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + bias`` with the adapter, for a weight that is no stack.

        Args:
            x: (..., d_in).
            values: the values of the layer.
            bias: (d_out,) or None.
        """
        op: Any = FROZEN_LINEAR
        if torch.is_grad_enabled() and (x.requires_grad or _trains(bias)):
            op = FROZEN_LINEAR_WITH_GRAD
        factors = self.lora_A, self.lora_B
        y: Tensor = op(x, values, self.forward_bits, self.scales, bias, *factors, self.form)
        return y

    def read(self, kept: Tensor) -> Tensor:
        """Returns the layer's ``weight``, as in SparseWeight."""
        if torch.compiler.is_compiling():
            return self.layout.to_parameter(self._dense(kept, adapter=True))
        with torch.inference_mode(False):  # inference tensors have no version counter
            dense = self._dense(kept, adapter=True)
            return DenseWeight.of(self, dense, self.layout.to_parameter(dense))

    def _dense(self, kept: Tensor, *, adapter: bool) -> Tensor:
        a, b = (self.lora_A, self.lora_B) if adapter else (None, None)
        dense: Tensor = FROZEN_EXPAND(kept, self.forward_bits, self.scales, a, b, self.form)
        return dense

    def _load_from_state_dict(self, *args: Any) -> None:
        with classes_kept(self):
            super()._load_from_state_dict(*args)

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_data_parallel()

    def extra_repr(self) -> str:
        adapter = f", rank={self.rank}" if self.rank else ""
        stack = f", stack={self.stack}" if self.stack > 1 else ""
        return f"frozen {self.pattern}, d_in={self.d_in}, d_out={self.d_out}{stack}{adapter}"

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, DTensor):
            raise StateError(
                f"{self.name} is of a frozen model, which can't be sharded, as by fully_shard. "
                f"{UNFROZEN}"
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenWeight":
        scales = None if self.scales is None else self.scales.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in self._parameters.items():
            if type(parameter) is nn.Parameter:  # torch made a plain parameter
                kind = Mask if name == "forward_bits" else Kept
                self._parameters[name] = kind(parameter.data)
        if scales is not None and self.scales is not None:
            # Scales stay bf16. The cast of an empty tensor shows the new dtype of the model.
            if self.scales.dtype != scales.dtype:
                self.scales = Kept(scales.to(self.scales.device))
            head = list(self.form)
            head[4] = FORM_DTYPES.index(fn(torch.empty(0, dtype=FORM_DTYPES[head[4]])).dtype)
            self.form = tuple(head)
        return self


def _trains(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


def forward_linear(module: Any, input: Tensor) -> Tensor:
    """The forward of a frozen ``nn.Linear`` or transformers ``Conv1D``."""
    y: Tensor = module.weight_sparse.product(input, module.weight_values, module.bias)
    return y
