"""The dense engine: expand the weight, then use the vendor's matrix product.

It runs on all devices and in all dtypes. It saves the memory of the model's state, and no
arithmetic: the dense weight exists during one product.
"""

from slope_fx.kernels.engine import Engine


class Dense(Engine):
    """The defaults of :class:`Engine`."""

    name = "dense"

    def yields_to(self, other: Engine) -> bool:
        """An engine that expands the weight with kernels of its own does the same faster."""
        return other.expands_weights
