"""``Method``: how a pruned weight is stored, read and changed while a model trains."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from slope_fx import ops
from slope_fx.kernels.errors import ArgumentError
from slope_fx.ops.targets import EXPAND

if TYPE_CHECKING:
    from slope_fx.planning.patterns import Pattern


@dataclass(frozen=True)
class WeightState:
    """What a method reads a weight from, besides its parameter.

    Attributes:
        forward_bits: packed mask, uint8 (rows, ceil(d_in / 8)).
        backward_bits: packed mask, uint8 (rows, ceil(d_in * N / M / 8)).
        pattern: N:M.
        factor: the number of the method, an fp32 tensor of shape (), or None.
        fading: whether the pruned part takes part.
        probe: zeros (rows, d_in * (M - N) / M) whose gradient is that of the pruned elements, in
            a step for which the method wants it; else None.
    """

    forward_bits: Tensor
    backward_bits: Tensor
    pattern: "Pattern"
    factor: Tensor | None = None
    fading: bool = False
    probe: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """The content of the parameter ``weight_values``, and the rules for masks and gradients.

    This class stores the kept values alone, (rows, d_in * N / M), in the order of the columns, and
    keeps the forward mask. To add a method, write a subclass in a file of its own and register it
    in :data:`METHODS`. Its fields are the numbers that a user may set; a checkpoint stores them.
    All functions are of tensors: rows are those of all matrices of a stack, or of a shard.

    Attributes:
        name: the name in ``compile(method=...)``.
        source: the paper that the formulas are from.
        compressed: whether the parameter has the kept values alone. Otherwise it is dense, and
            :func:`slope_fx.compress_` ends the method.
        fades: whether the pruned part takes part until the factor of the weight is zero.
        steps: whether steps change masks, factor or probe.
        whole: whether a step needs whole weights, so that processes cannot share one in shards.
        when_expanded: what is lost if no pass rewrites the linear.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    compressed: ClassVar[bool] = True
    fades: ClassVar[bool] = False
    steps: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    when_expanded: ClassVar[str] = (
        "the loss is right, but the layer is slow and its input gradient is that of W^R, not of "
        "the double-pruned W^{R,C}"
    )

    def shape(self, rows: int, d_in: int, pattern: "Pattern") -> tuple[int, ...]:
        """The shape of the parameter, for all rows of a stack."""
        return rows, d_in * pattern.n // pattern.m

    def nbytes(self, rows: int, d_in: int, pattern: "Pattern", itemsize: int) -> int:
        """The size of the parameter in bytes, for a dense weight with ``itemsize`` bytes each."""
        return math.prod(self.shape(rows, d_in, pattern)) * itemsize

    def keep(self, matrix: Tensor, forward_bits: Tensor, pattern: "Pattern") -> Tensor:
        """Returns the data of the parameter for a dense weight.

        Args:
            matrix: (rows, d_in).
            forward_bits: packed mask, uint8 (rows, ceil(d_in / 8)).
            pattern: N:M.
        """
        return ops.compress(matrix.contiguous(), forward_bits, pattern.n, pattern.m)

    def factor(self, matrix: Tensor, forward_bits: Tensor, pattern: "Pattern") -> Tensor | None:
        """The method's number for a dense weight, an fp32 tensor of shape (); None without one.

        It is a buffer of the weight, and checkpoints store it.
        """
        return None

    def factor_at(self, step: int, total_steps: int) -> float | None:
        """The method's number after ``step`` of ``total_steps`` steps; None if it stays."""
        return None

    def probes(self, step: int, total_steps: int) -> bool:
        """Whether the next step after ``step`` needs the gradient of the pruned elements."""
        return False

    def values(
        self, kept: Tensor, forward_bits: Tensor, factor: Tensor | None, pattern: "Pattern"
    ) -> Tensor:
        """The values (rows, d_in * N / M) of the pruned weight, with autograd."""
        return kept

    def weight(self, kept: Tensor, read: WeightState) -> Tensor:
        """The matrix (rows, d_in) that a linear reads: a marker, which the passes find."""
        n, m = read.pattern.n, read.pattern.m
        values = self.values(kept, read.forward_bits, read.factor, read.pattern)
        dense: Tensor = EXPAND(values, read.forward_bits, read.backward_bits, n, m)
        return dense

    def without_effect(self, total_steps: int) -> str:
        """The reason why a run of so many steps is one of "slope", or ""."""
        return ""

    def change_gradient(
        self, gradient: Tensor, kept: Tensor, forward_bits: Tensor, scale: Tensor | float
    ) -> None:
        """Change the gradient of the parameter in place, before a step of an optimizer.

        Args:
            gradient: the gradient of the parameter, multiplied by ``scale``.
            kept: the parameter.
            forward_bits: the packed forward mask.
            scale: a GradScaler's factor, which the gradient still has; else 1.
        """

    def moves(self, read: WeightState) -> bool:
        """Whether a step, in which the weight was read so, is followed by another forward mask."""
        return False

    def next_mask(self, kept: Tensor, read: WeightState, step: int, total_steps: int) -> Tensor:
        """Choose the forward mask after a step, if :meth:`moves` says so.

        Args:
            kept: the parameter, after the step.
            read: how it was read in the step.
            step, total_steps: number of steps so far, and of the run.

        Returns:
            The packed forward mask.
        """
        return read.forward_bits

    def check(self, field: str, good: bool, allowed: str) -> None:
        """Check a field, in ``__post_init__``.

        Raises:
            ArgumentError: it is not good.
        """
        if not good:
            raise ArgumentError(
                f"{type(self).__name__}({field}={getattr(self, field)!r}); allowed is {allowed}."
            )

    def to_data(self) -> str | dict[str, Any]:
        """The method as data for JSON: its name, with the fields that differ from the defaults."""
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return {"name": self.name, **given} if given else self.name


@dataclass(frozen=True)
class DenseMaster(Method):
    """A method that stores and trains the whole dense weight, and prunes what the forward reads.

    The forward product is sparse. The input gradient is exact, and the gradient of the weight
    is dense: it reaches all elements of the dense weight, as if the pruning were the identity
    (the straight-through estimator). Each step chooses the masks again.
    """

    compressed: ClassVar[bool] = False
    steps: ClassVar[bool] = True
    when_expanded: ClassVar[str] = "all numbers are right, but its forward product is dense"

    def shape(self, rows: int, d_in: int, pattern: "Pattern") -> tuple[int, ...]:
        return rows, d_in

    def keep(self, matrix: Tensor, forward_bits: Tensor, pattern: "Pattern") -> Tensor:
        return matrix.clone(memory_format=torch.contiguous_format)

    def values(
        self, kept: Tensor, forward_bits: Tensor, factor: Tensor | None, pattern: "Pattern"
    ) -> Tensor:
        return ops.compress(kept.detach(), forward_bits, pattern.n, pattern.m)

    def weight(self, kept: Tensor, read: WeightState) -> Tensor:
        n, m = read.pattern.n, read.pattern.m
        values = self.values(kept, read.forward_bits, read.factor, read.pattern)
        dense: Tensor = EXPAND(values, read.forward_bits, read.backward_bits, n, m, kept)
        return dense

    def moves(self, read: WeightState) -> bool:
        return True

    def next_mask(self, kept: Tensor, read: WeightState, step: int, total_steps: int) -> Tensor:
        return ops.magnitude_mask(kept, read.pattern.n, read.pattern.m)


def is_within(value: object, least: float, most: float) -> bool:
    """Whether ``value`` is a number in a closed interval."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and least <= value <= most  # type: ignore[operator]
