"""Engines: the arithmetic behind the ops, one file or folder an engine.

An engine is a module with the functions of :data:`OPERATIONS`. It sees tensors
and integers only; it knows nothing of modules, graphs or autograd.

``reference``
    the oracle: each formula of the method written the plain way, any device, any
    dtype. The tests run it in float64.
``dense``
    expand, then the vendor's matrix product: any device, any dtype, no gain in speed.
``cpu``
    C for the CPU, N/M of the dense work for any N:M.
``triton``
    Triton for NVIDIA GPUs.
``cusparselt``
    NVIDIA's sparse tensor cores: 2:4 in 16 bits.
``vendor``
    the vendor's product, with an engine's own kernels around it: ``cpu-dense``,
    ``triton-dense``.

``engines`` lists them and says which may compute what, ``selection`` which of them does compute a
given product, by the measurements of ``racing``.
"""

from typing import NoReturn

if __name__ != "slope_fx.kernels":
    # Imported under its bare name, as can happen in the root of a checkout. transformers
    # does so, to ask for the version of another package called kernels, and would break
    # if that raised; anybody who wants something of it gets the error.
    def __getattr__(name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"import slope_fx.kernels, not {__name__}")

else:
    from slope_fx.kernels.engines import ENGINES

    OPERATIONS = (
        "magnitude_mask",
        "backward_mask",
        "expand",
        "compress",
        "sparse_linear",
        "sparse_input_grad",
        "sparse_weight_grad",
        "low_rank_update",
    )

    __all__ = ["ENGINES", "OPERATIONS"]
