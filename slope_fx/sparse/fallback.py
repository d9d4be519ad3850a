"""Reports a sparse layer that runs with its dense weight rebuilt."""

import warnings
from typing import Literal

from slope_fx.errors import ExpandedWeightError, ExpandedWeightWarning

OnFallback = Literal["warn", "error", "ignore"]


class Fallback:
    """The fallback state of one layer.

    Attributes:
        name: name of the layer.
        policy: ``on_fallback`` of ``compile``.
        costs: what the layer loses.
        because: the reason why the layer trained with its dense weight rebuilt, or None.
        hint: the reason why the dense weight was last rebuilt with gradients enabled, or None.
    """

    def __init__(self, name: str, policy: OnFallback, costs: str) -> None:
        self.name, self.policy, self.costs = name, policy, costs
        self.because: str | None = None
        self.hint: str | None = None

    def note(self, reason: str, *, trains: bool) -> None:
        """Note that the dense weight was rebuilt with gradients enabled.

        A read alone is harmless, so the report waits until a gradient arrives. A frozen layer gets
        no gradient, but computes an input gradient, so it is reported immediately.

        Args:
            reason: why the weight was rebuilt.
            trains: whether the values require gradients.
        """
        self.hint = reason
        if not trains:
            self.report(reason)

    def report(self, reason: str) -> None:
        """Warn once, or raise, because the layer trains with its dense weight rebuilt.

        Raises:
            ExpandedWeightError: with ``on_fallback="error"``.
        """
        message = (
            f"{self.name}: {reason}, so it trains with its dense weight rebuilt: "
            f"{self.costs}. Call the object that slope_fx.compile returned, without "
            "another torch.compile around it (a trainer's torch_compile=True, dynamo_backend=), "
            "and see TORCH_LOGS=recompiles,graph_breaks for why Dynamo gave up, if it did."
        )
        if self.policy == "error":
            raise ExpandedWeightError(message)
        if self.policy == "warn" and self.because is None:
            warnings.warn(message, ExpandedWeightWarning, stacklevel=5)
        self.because = reason

    def gradient_arrived(self) -> None:
        """Report that a gradient arrived at the rebuilt weight, however the model is compiled."""
        if self.because is None or self.policy == "error":
            self.report(
                self.hint
                or "it is in a graph that no pass rewrote (one compiled by another backend, or "
                "shared with a layer already named)"
            )


def tell_of_export() -> None:
    """Warn that an exported program has dense weights."""
    warnings.warn(
        "torch.export of a model with sparse weights: the program rebuilds each dense weight "
        "at every call, and needs slope_fx to run. For inference with sparse products, call "
        "slope_fx.freeze(model) first, then torch.export or slope_fx.package. For a plain "
        "program, export a dense copy: slope_fx.densify(model).",
        ExpandedWeightWarning,
        stacklevel=3,
    )
