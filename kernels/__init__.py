"""Engines: the arithmetic behind the ops, one file or folder an engine.

An engine is a module with the functions of :data:`OPERATIONS`. It sees tensors
and integers only; it knows nothing of modules, graphs or autograd.

``reference``
    the oracle: each formula of the method written the plain way, any device, any
    dtype. The tests run it in float64.
``dense``
    expand, then the vendor's matrix product; the engine that trains today.
"""

from types import ModuleType
from typing import NoReturn

import torch

if __name__ != "slope_fx.kernels":
    # Imported under its bare name, as can happen in the root of a checkout. transformers
    # does so, to ask for the version of another package called kernels, and would break
    # if that raised; anybody who wants something of it gets the error.
    def __getattr__(name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"import slope_fx.kernels, not {__name__}")

else:
    from slope_fx.kernels import dense, reference

    OPERATIONS = (
        "magnitude_mask",
        "backward_mask",
        "expand",
        "compress",
        "sparse_linear",
        "sparse_input_grad",
        "sparse_weight_grad",
    )

    ENGINES: dict[str, ModuleType] = {"dense": dense, "reference": reference}

    def engine_for(device: torch.device) -> str:
        """The name of the engine that serves ``device``: today one for all of them."""
        return "dense"

    __all__ = ["ENGINES", "OPERATIONS", "engine_for"]
