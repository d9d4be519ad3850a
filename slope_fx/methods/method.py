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
    from slope_fx.sparse.weight import SparseWeight


@dataclass(frozen=True)
class Method:
    """The content of the parameter ``weight_values``, and the rules for masks and gradients.

    This class stores the kept values alone, (rows, d_in * N / M), in the order of the columns, and
    keeps the forward mask. To add a method, write a subclass in a file of its own and register it
    in :data:`METHODS`. Its fields are the numbers that a user may set; a checkpoint stores them.

    Attributes:
        name: the name in ``compile(method=...)``.
        source: the paper that the formulas are from.
        compressed: whether the parameter has the kept values alone. Otherwise it is dense, and
            :func:`slope_fx.compress_` ends the method.
        fades: whether the pruned part takes part until the factor of the weight is zero.
        steps: whether :meth:`after_step` and :meth:`prepare` do anything.
        when_expanded: what is lost if no pass rewrites the linear.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    compressed: ClassVar[bool] = True
    fades: ClassVar[bool] = False
    steps: ClassVar[bool] = False
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
            matrix: (rows, d_in), with the rows of all matrices of a stack.
            forward_bits: packed mask, uint8 (rows, ceil(d_in / 8)).
            pattern: N:M.
        """
        return ops.compress(matrix.contiguous(), forward_bits, pattern.n, pattern.m)

    def factor(self, matrix: Tensor, forward_bits: Tensor, pattern: "Pattern") -> Tensor | None:
        """The method's number for a dense weight, an fp32 tensor of shape (); None without one.

        It is a buffer of the weight, and checkpoints store it.
        """
        return None

    def values(
        self, kept: Tensor, forward_bits: Tensor, factor: Tensor | None, pattern: "Pattern"
    ) -> Tensor:
        """The values (rows, d_in * N / M) of the pruned weight, with autograd."""
        return kept

    def weight(self, weight: "SparseWeight", kept: Tensor, masks: tuple[Tensor, Tensor]) -> Tensor:
        """The matrix (rows, d_in) that a linear reads: a marker, which the passes find.

        Args:
            weight: the weight.
            kept: its parameter.
            masks: its packed forward and backward masks.
        """
        values = self.values(kept, masks[0], weight.factor, weight.pattern)
        dense: Tensor = EXPAND(values, *masks, weight.n, weight.m)
        return dense

    def before_step(self, weight: "SparseWeight") -> None:
        """Change the gradient of the parameter before a step of an optimizer."""

    def after_step(self, weight: "SparseWeight") -> None:
        """Change masks and values after a step. :class:`~slope_fx.Schedule` calls it."""

    def prepare(self, weight: "SparseWeight", step: int, total_steps: int) -> None:
        """Set what depends on the number of steps alone. It is called again after a resume.

        Args:
            weight: the weight.
            step: number of steps so far.
            total_steps: number of steps of the run.
        """

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
    (the straight-through estimator). After each step the masks are chosen anew.
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

    def weight(self, weight: "SparseWeight", kept: Tensor, masks: tuple[Tensor, Tensor]) -> Tensor:
        values = self.values(kept, masks[0], weight.factor, weight.pattern)
        dense: Tensor = EXPAND(values, *masks, weight.n, weight.m, kept)
        return dense

    def after_step(self, weight: "SparseWeight") -> None:
        weight.choose_masks()


def is_within(value: object, least: float, most: float) -> bool:
    """Whether ``value`` is a number in a closed interval."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and least <= value <= most  # type: ignore[operator]
