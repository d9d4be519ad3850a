"""``Phase``: whether the adapters of a model are active."""

from dataclasses import dataclass


@dataclass
class Phase:
    """The phase of a model. All sparse weights of the model and of its deep copies share it.

    A :class:`~slope_fx.Schedule` changes the phase. A copy of the model, as for an average of the
    weights, gets a separate phase when a Schedule is made for it.

    Attributes:
        active: whether the adapters are active. Dynamo guards on it, so a change recompiles.
        scheduled: whether a Schedule was made for the model.
        told: whether a warning was given that the model has adapters and no Schedule.
    """

    active: bool = False
    scheduled: bool = False
    told: bool = False
