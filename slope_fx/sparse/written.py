"""Applies the writes to a reading of a sparse weight to its values, or refuses them."""

from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn

from slope_fx.errors import UnsupportedError
from slope_fx.ops.dispatch import local
from slope_fx.passes.views import Layout
from slope_fx.sparse.blank import Started, put


class Read(Started, Protocol):
    """The part of :class:`~slope_fx.SparseWeight` that a reading needs."""

    _values_name: str

    @property
    def adapter_active(self) -> bool: ...

    @property
    def values(self) -> nn.Parameter: ...

    def expanded(self) -> Tensor: ...

    def has_pruned(self, matrix: Tensor) -> bool: ...

    def store(self, matrix: Tensor) -> None: ...


@dataclass
class Reading:
    """One read of a weight.

    Attributes:
        weight: the sparse weight.
        dense: the temporary tensor (stack * d_out, d_in). All views share its memory.
        stamp: stamp of the values at the time of the read.
        layout: if it is given, ``dense`` has the shape of the layer's parameter instead.
        unpruned: whether the temporary still has the elements that the values lack. An
            initialization in several steps, such as ``sparse_``, needs them.
    """

    weight: Read
    dense: Tensor
    stamp: tuple[int, ...]
    layout: Layout | None = None
    unpruned: bool = False

    def refuse(self, what: str, instead: str = "") -> NoReturn:
        """Raise an error about the operation ``what``.

        Args:
            what: the problem.
            instead: what to do; "" for the general advice.

        Raises:
            UnsupportedError: always.
        """
        name = self.weight.name
        raise UnsupportedError(
            f"{name}: {what}. `weight` of a sparse layer is made from its values at each reading. "
            + (
                instead
                or "To write a dense weight and drop its pruned elements, call "
                f"slope_fx.sparse_weights(model)[{name!r}].write_(dense)."
            )
        )

    @torch.no_grad()
    def renew(self) -> None:
        """Give the temporary the current content of the weight."""
        content = self.weight.expanded()
        put(self.dense, content if self.layout is None else self.layout.to_parameter(content))
        self.unpruned = False

    def written(self, what: str, *, initialises: bool, in_grad_mode: bool) -> None:
        """Apply a write to the temporary to the values, or undo it and raise an error.

        Args:
            what: name of the operation that wrote.
            initialises: whether the write is an initialization.
            in_grad_mode: whether the write was recorded by autograd.

        Raises:
            UnsupportedError: the write cannot be applied to the values.
        """
        weight, start = self.weight, self.weight.start
        matrix = self.dense if self.layout is None else self.layout.to_matrix(self.dense)
        now = stamp_of(weight)
        reason = instead = ""
        if in_grad_mode:
            reason = f"{what} writes to it while gradients are on"
            instead = "Write under torch.no_grad(), as to any parameter."
        elif now != self.stamp:
            reason = f"{what} writes to a `weight` that was read before its values changed"
            instead = "Read `weight` again."
        elif start is not None and (
            initialises or not start.written or what in ("copy_()", "`data`")
        ):
            if self.dense.is_meta:
                return  # a write to a meta tensor has no effect
            if start.written or not self.dense.isnan().any():
                weight.store(matrix)
                self.unpruned = True
            else:
                start.partial = self.dense.detach()
            self.stamp = stamp_of(weight)
            return
        elif weight.adapter_active:
            reason = f"{what} writes to it while its adapter is active, which `weight` includes"
        elif not initialises and weight.has_pruned(matrix):
            reason = f"{what} writes to elements that are pruned, which would be lost"
            if what == "`data`" or "add" in what:
                instead = (
                    "Keep the update apart, as an adapter, or make the model dense first: "
                    "slope_fx.densify(model). To drop the pruned elements, call "
                    f"slope_fx.sparse_weights(model)[{weight.name!r}].write_(dense)."
                )
        if reason:
            if start is None or start.written:
                self.renew()
            self.refuse(reason, instead)
        weight.store(matrix)
        self.stamp = stamp_of(weight)
        if initialises:
            self.renew()


_steps = 0


def note_step() -> None:
    """Count an optimizer step. Some optimizers do not change the version of a parameter."""
    global _steps
    _steps += 1


def stamp_of(weight: Read) -> tuple[int, ...]:
    values = local(weight.values)
    return values.data_ptr(), (0 if values.is_inference() else values._version), _steps
