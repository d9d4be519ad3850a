"""The parts of which a sparse weight is made, and what all sparse weights of a model share."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slope_fx.kernels.selection import Choice, Problem
from slope_fx.methods import Method
from slope_fx.planning.adapters import Adapter
from slope_fx.sparse.blank import Start
from slope_fx.sparse.phase import Phase


class Choices(dict[Problem, Choice]):
    """The engines that were chosen for products. They are of this process: pickles omit them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Choices, ()


@dataclass(frozen=True)
class Parts:
    """The tensors that replace the dense weight of a layer.

    Attributes:
        kept: the data of the parameter as the method stores it, any floating dtype.
        forward_bits: uint8 (stack * d_out, ceil(d_in / 8)).
        backward_bits: uint8 (stack * d_out, ceil(d_in * N / M / 8)). None: chosen from the values.
        adapter: the adapter, or None.
        start: for tensors on the meta device, how they get their content.
        factor: the number of the method, fp32 (), or None.
    """

    kept: Tensor
    forward_bits: Tensor
    backward_bits: Tensor | None = None
    adapter: Adapter | None = None
    start: Start | None = None
    factor: Tensor | None = None


@dataclass(frozen=True)
class Shared:
    """The objects that all sparse weights of a model share.

    Attributes:
        method: how the weights are stored and trained.
        phase: whether the adapters take part.
        choices: the engines of the products that the model ran so far.
    """

    method: Method
    phase: Phase
    choices: Choices
