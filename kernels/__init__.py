"""Engines: the arithmetic of the ops, one file or folder for each engine.

An engine is an object of a subclass of :class:`engine.Engine`, which documents its operations.

``reference``
    the oracle: the formulas of the method in their plain form, for any device and dtype. The tests
    use it in float64.
``dense``
    expand, then the vendor's matrix product: any device and dtype, with no gain in speed.
``cpu``
    C for the CPU: N/M of the dense work, for any N:M.
``triton``
    Triton for NVIDIA GPUs.
``cusparselt``
    the sparse tensor cores of NVIDIA GPUs: 2:4 in 16 bits.
``cpu-dense``, ``triton-dense``
    the vendor's matrix product with the masks and conversions of an engine (``vendor.py``).

``engines`` lists the engines and finds those that can compute a product. ``selection`` chooses the
fastest of these by the measurements of ``racing``.
"""

from typing import NoReturn

if __name__ != "slope_fx.kernels":
    # This is an import under the bare name, which can occur in the root of a checkout.
    # transformers does so to get the version of another package named kernels, and would fail if
    # this module raised an error. The import of a name from it raises the error.
    def __getattr__(name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"import slope_fx.kernels, not {__name__}")

else:
    from slope_fx.kernels.engine import Engine
    from slope_fx.kernels.engines import ENGINES

    __all__ = ["ENGINES", "Engine"]
