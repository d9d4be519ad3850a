"""Training methods, one a file: ``compile(method=...)``.

The room is below ``sparse``: a method is given tensors, and knows nothing of modules.
"""

from collections.abc import Mapping
from typing import Any

from slope_fx.kernels.errors import ArgumentError
from slope_fx.methods.dense import Dense
from slope_fx.methods.evolve import Evolve
from slope_fx.methods.gradual import Gradual
from slope_fx.methods.method import DenseMaster, Method, WeightState
from slope_fx.methods.s_ste import SSTE
from slope_fx.methods.slope import Slope
from slope_fx.methods.sr_ste import SRSTE

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Slope, Dense, SRSTE, SSTE, Gradual, Evolve)
}
"""The methods by name."""


def method_of(given: str | Mapping[str, Any] | Method) -> Method:
    """Returns the method for a name, for data of :meth:`Method.to_data`, or as it is given.

    Raises:
        ArgumentError: there is no such method, or it has no such field.
    """
    if isinstance(given, Method):
        return given
    fields = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in METHODS:
        names = ", ".join(map(repr, METHODS))
        raise ArgumentError(
            f"method={given!r}; allowed are {names}, or a slope_fx.methods.Method such as "
            "SRSTE(decay=6e-5)."
        )
    try:
        return METHODS[name](**fields)
    except TypeError:
        raise ArgumentError(f"method={given!r}; {name!r} has no such field.") from None


__all__ = [
    "METHODS",
    "SRSTE",
    "SSTE",
    "Dense",
    "DenseMaster",
    "Evolve",
    "Gradual",
    "Method",
    "Slope",
    "WeightState",
    "method_of",
]
