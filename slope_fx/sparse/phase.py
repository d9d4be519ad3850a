"""``Phase``: whether the adapters of a model are active."""

import weakref
from typing import Any


class Phase:
    """The phase of a model. All sparse weights of the model share it.

    A :class:`~slope_fx.Schedule` changes the phase. A deep copy of the model, as for an average of
    the weights, has a phase of its own. It follows the phase of the original into the adapter
    phase, until a Schedule is made for the copy.

    Attributes:
        active: whether the adapters are active. Dynamo guards on it, so a change recompiles.
        fading: whether the pruned part of the weights takes part, as a method may let it. Dynamo
            guards on it.
        scheduled: whether a Schedule was made for the model.
        told: whether a warning was given that the model has adapters and no Schedule.
        pipeline: the process group of the pipeline that the model runs in as a stage, or None.
    """

    def __init__(self, active: bool = False, fading: bool = False) -> None:
        self.active, self.fading = active, fading
        self.scheduled = self.told = False
        self.pipeline: Any = None
        self._copies: weakref.WeakSet[Phase] = weakref.WeakSet()

    def set(self, active: bool) -> None:
        """Change the phase. Copies without a Schedule become active too."""
        self.active = active
        for copy in self._copies if active else ():
            if not copy.scheduled:
                copy.set(True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Phase":
        made = Phase(self.active, self.fading)
        self._copies.add(made)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Phase, (self.active, self.fading)
