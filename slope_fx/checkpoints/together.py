"""Ranks that save or load a checkpoint together, and fail together."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from slope_fx.errors import CheckpointError


class Together:
    """The ranks of the default process group, or this process alone without one.

    All methods are collective operations: each rank must call them in the same order.

    Attributes:
        rank: the rank of this process.
        world: the number of ranks.
    """

    def __init__(self) -> None:
        many = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)

    def gather(self, value: Any) -> list[Any]:
        """The plain values of all ranks, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def distinct(self, value: Any) -> tuple[list[Any], list[int]]:
        """The different values of the ranks, each sent once. Ranks mostly have equal ones.

        Args:
            value: plain data for JSON.

        Returns:
            The different values, in the order of the first rank that has each; and for each rank
            the index of its value.
        """
        if self.world == 1:
            return [value], [0]
        digests = self.gather(hashlib.sha256(json.dumps(value).encode()).hexdigest())
        order = list(dict.fromkeys(digests))
        mine = digests.index(digests[self.rank]) == self.rank
        values = [sent[0] for sent in self.gather([value] if mine else None) if sent is not None]
        return values, [order.index(digest) for digest in digests]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Ends on all ranks with an error if the block raises an error on one of them.

        The block must not contain a collective operation that another rank would wait for.

        Raises:
            CheckpointError: the block raised an error on another rank.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        self.agree(error)

    def agree(self, error: Exception | None) -> None:
        """Raises ``error``, or the error of another rank as a :class:`CheckpointError`."""
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(told):
            if message is not None:
                raise CheckpointError(f"rank {rank} failed, so nothing was done: {message}")
