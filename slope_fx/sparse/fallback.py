"""What a sparse layer says when it runs with its dense weight rebuilt."""

import warnings
from typing import Literal

from slope_fx.errors import ExpandedWeightError, ExpandedWeightWarning

OnFallback = Literal["warn", "error", "ignore"]


class Fallback:
    """The state of one layer.

    Attributes:
        name: of the layer.
        policy: ``on_fallback`` of ``compile``.
        because: why the layer trained with its dense weight rebuilt; None if it didn't.
        hint: why its dense weight was last rebuilt where gradients are on.
    """

    def __init__(self, name: str, policy: OnFallback) -> None:
        self.name, self.policy = name, policy
        self.because: str | None = None
        self.hint: str | None = None

    def note(self, reason: str, *, trains: bool) -> None:
        """Take note that the dense weight was rebuilt where gradients are on.

        Reading it does no harm. That the layer trains so shows when a gradient arrives, and is
        reported then. A layer that doesn't train gets no gradient, but passes one on: it is
        reported at once.
        """
        self.hint = reason
        if not trains:
            self.report(reason)

    def report(self, reason: str) -> None:
        """Say, once, that this layer trains with its dense weight rebuilt.

        Raises:
            ExpandedWeightError: with ``on_fallback="error"``.
        """
        message = (
            f"{self.name}: {reason}, so it trains with its dense weight rebuilt: the loss is "
            "right, but the layer is slow and its input gradient is that of W^R, not of the "
            "double-pruned W^{R,C}. Call the object that slope_fx.compile returned, without "
            "another torch.compile around it (a trainer's torch_compile=True, dynamo_backend=), "
            "and see TORCH_LOGS=recompiles,graph_breaks for why Dynamo gave up, if it did."
        )
        if self.policy == "error":
            raise ExpandedWeightError(message)
        if self.policy == "warn" and self.because is None:
            warnings.warn(message, ExpandedWeightWarning, stacklevel=5)
        self.because = reason

    def gradient_arrived(self) -> None:
        """A gradient came through the rebuilt weight: the last sign, however it was compiled."""
        if self.because is None or self.policy == "error":
            self.report(
                self.hint
                or "it is in a graph that no pass rewrote (one compiled by another backend, or "
                "shared with a layer already named)"
            )
