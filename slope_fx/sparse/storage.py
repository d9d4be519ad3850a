"""A registry of storages, the formats of pruned weights between optimizer steps."""

import math
from abc import ABC, abstractmethod

from torch import Tensor

from slope_fx import ops
from slope_fx.errors import ArgumentError
from slope_fx.planning.patterns import Pattern


class Storage(ABC):
    """The content of the parameter ``weight_values``, and how values are computed from it.

    Checkpoints store that parameter and the packed masks. To add a format, write a subclass in a
    file of its own and register an instance of it in :data:`STORAGES`.
    """

    name: str

    @abstractmethod
    def keep(self, matrix: Tensor, forward_bits: Tensor, pattern: Pattern) -> Tensor:
        """Returns the data of the parameter for a dense weight.

        Args:
            matrix: (rows, d_in), with the rows of all matrices of a stack.
            forward_bits: packed mask, uint8 (rows, ceil(d_in / 8)).
            pattern: N:M.

        Returns:
            The data of the parameter, of shape :meth:`shape`.
        """

    @abstractmethod
    def values(self, kept: Tensor, forward_bits: Tensor, pattern: Pattern) -> Tensor:
        """The values (rows, d_in * N / M). Computed at each read, with autograd."""

    @abstractmethod
    def shape(self, rows: int, d_in: int, pattern: Pattern) -> tuple[int, ...]:
        """The shape of the parameter."""

    def nbytes(self, rows: int, d_in: int, pattern: Pattern, itemsize: int) -> int:
        """The size of the parameter in bytes, for a dense weight with ``itemsize`` bytes each."""
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
    """Returns the storage with a name.

    Raises:
        ArgumentError: no storage has this name.
    """
    if not isinstance(name, str) or name not in STORAGES:
        raise ArgumentError(f"storage={name!r}; allowed are {', '.join(map(repr, STORAGES))}.")
    return STORAGES[name]
