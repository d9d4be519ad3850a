"""SLoPe, the default method."""

from dataclasses import dataclass
from typing import ClassVar

from slope_fx.methods.method import Method


@dataclass(frozen=True)
class Slope(Method):
    """Only the kept values are stored. The forward mask is chosen once.

    The input gradient is double-pruned: :class:`~slope_fx.Schedule` refreshes the backward mask.
    """

    name: ClassVar[str] = "slope"
    source: ClassVar[str] = "SLoPe, arXiv 2405.16325"
