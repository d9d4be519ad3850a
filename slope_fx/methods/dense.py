"""A control for comparisons: nothing is pruned."""

from dataclasses import dataclass
from typing import ClassVar

from slope_fx.methods.method import Method


@dataclass(frozen=True)
class Dense(Method):
    """All linears stay dense. The model is compiled by the same regions."""

    name: ClassVar[str] = "dense"
    source: ClassVar[str] = ""
