"""Engines: the arithmetic behind the ops, one file or folder an engine.

An engine is a module with the functions of :data:`OPERATIONS`. It sees tensors
and integers only; it knows nothing of modules, graphs or autograd.

``reference``
    the oracle: each formula of the method written the plain way, any device, any
    dtype. The tests run it in float64.
``dense``
    expand, then the vendor's matrix product; the engine that trains today.
"""

if __name__ != "slope_fx.kernels":
    # A second import under another name would load every engine twice.
    raise ImportError(f"import this package as slope_fx.kernels, not as {__name__!r}")

from types import ModuleType

import torch

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
