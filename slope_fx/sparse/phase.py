"""Whether the adapters of a model take part: one state for all of its sparse weights."""

from dataclasses import dataclass


@dataclass
class Phase:
    """The phase of a model. Its sparse weights share it, and so do those of its deep copies.

    A :class:`~slope_fx.Schedule` moves it. A copy of the model, as for an average of the weights,
    follows until a Schedule of its own gives it a phase of its own.

    Attributes:
        active: whether the adapters take part. Dynamo guards on it: a change recompiles.
        scheduled: whether a Schedule was made for the model.
        told: whether it was said that the model has adapters and no Schedule.
    """

    active: bool = False
    scheduled: bool = False
    told: bool = False
