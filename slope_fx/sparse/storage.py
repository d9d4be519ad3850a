"""How a pruned weight is kept between optimizer steps: a registry of storage formats."""

import math
from abc import ABC, abstractmethod

from torch import Tensor

from slope_fx import ops
from slope_fx.errors import ArgumentError
from slope_fx.planning.patterns import Pattern


class Storage(ABC):
    """A storage format: what the parameter ``weight_values`` holds, and how values come from it.

    Checkpoints store that parameter and the packed masks. To add a format, write a subclass in a
    file of its own and register an instance of it in :data:`STORAGES`.
    """

    name: str

    @abstractmethod
    def keep(self, matrix: Tensor, forward_bits: Tensor, pattern: Pattern) -> Tensor:
        """What is kept of a dense weight.

        Args:
            matrix: (rows, d_in); the rows of a stack lie one below the other.
            forward_bits: packed mask, uint8 (rows, ceil(d_in / 8)).
            pattern: N:M.

        Returns:
            The data of the parameter, of shape :meth:`shape`.
        """

    @abstractmethod
    def values(self, kept: Tensor, forward_bits: Tensor, pattern: Pattern) -> Tensor:
        """The compressed values (rows, d_in * N / M), at each reading, with autograd."""

    @abstractmethod
    def shape(self, rows: int, d_in: int, pattern: Pattern) -> tuple[int, ...]:
        """The shape of the parameter."""

    def nbytes(self, rows: int, d_in: int, pattern: Pattern, itemsize: int) -> int:
        """Bytes of the parameter, where an element of the dense weight has ``itemsize``."""
        return math.prod(self.shape(rows, d_in, pattern)) * itemsize


class CompressedValues(Storage):
    """The kept values alone, (rows, d_in * N / M), in the order of the columns."""

    name = "values"

    def keep(self, matrix: Tensor, forward_bits: Tensor, pattern: Pattern) -> Tensor:
        return ops.compress(matrix.contiguous(), forward_bits, pattern.n, pattern.m)

    def values(self, kept: Tensor, forward_bits: Tensor, pattern: Pattern) -> Tensor:
        return kept

    def shape(self, rows: int, d_in: int, pattern: Pattern) -> tuple[int, ...]:
        return rows, d_in * pattern.n // pattern.m


STORAGES: dict[str, Storage] = {format.name: format for format in (CompressedValues(),)}


def storage_named(name: str) -> Storage:
    """The storage format of a name.

    Raises:
        ArgumentError: there is none.
    """
    if name not in STORAGES:
        raise ArgumentError(f"storage={name!r}; allowed are {', '.join(map(repr, STORAGES))}.")
    return STORAGES[name]
