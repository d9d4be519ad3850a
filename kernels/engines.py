"""The list of engines, and which of them are allowed and able to compute a product.

``SLOPE_FX_ENGINES`` limits the engines. Names separated by commas are the allowed engines; a name
after a minus is forbidden (``cpu``; ``cpu,dense``; ``-cpu``). If one engine is left, nothing is
measured. ``dense`` is a candidate only where it is named or ``cpu-dense`` cannot run, which does
the same faster. ``reference`` is a candidate only where it is named.
"""

import functools
import os
import warnings

import torch
from torch import Tensor

from slope_fx.kernels.cpu import Cpu
from slope_fx.kernels.cusparselt import Cusparselt
from slope_fx.kernels.dense import Dense
from slope_fx.kernels.engine import Engine
from slope_fx.kernels.errors import ArgumentError, EngineWarning
from slope_fx.kernels.reference import Reference
from slope_fx.kernels.triton import Triton
from slope_fx.kernels.vendor import VendorProducts

_cpu, _triton = Cpu(), Triton()
ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        _cpu,
        VendorProducts(_cpu),
        _triton,
        VendorProducts(_triton),
        Cusparselt(_triton),
        Dense(),
        Reference(),
    )
}
"""All engines by name. Where no measurement is possible, the first candidate is used."""

AUTO = "auto"


def allowed_engines(engines: str = AUTO) -> tuple[str, ...]:
    """The names of the engines that ``engines`` and the environment allow, in the listed order.

    Args:
        engines: "auto", or names separated by commas. Names override ``SLOPE_FX_ENGINES``.

    Raises:
        ArgumentError: a name is unknown, or no engine is left.
    """
    source, text = "engine", engines
    if engines == AUTO:
        source, text = "SLOPE_FX_ENGINES", os.environ.get("SLOPE_FX_ENGINES", "")
    names = _split(text)
    known = ", ".join(ENGINES)
    for name in names:
        if name.removeprefix("-") not in ENGINES:
            raise ArgumentError(
                f"{source}={text!r}: {name!r} is not an engine. The engines are {known}. "
                "Separate names by commas; -name forbids an engine."
            )
    named = [name for name in ENGINES if name in names]
    competing = [name for name, engine in ENGINES.items() if engine.competes]
    left = tuple(name for name in named or competing if f"-{name}" not in names)
    if not left:
        raise ArgumentError(f"{source}={text!r} leaves no engine. The engines are {known}.")
    return left


def limited(engines: str) -> str:
    """``engines``, with the value of ``SLOPE_FX_ENGINES`` in the place of "auto".

    A graph with this value depends on the environment, also in the caches of torch.compile.
    """
    return (os.environ.get("SLOPE_FX_ENGINES", "").strip() or AUTO) if engines == AUTO else engines


def without_operands(engines: str) -> str:
    """``engines`` without those that keep operands."""
    allowed = allowed_engines(engines)
    keeping = [name for name in allowed if ENGINES[name].keeps_operands]
    if len(keeping) == len(allowed):
        return "dense"
    named = [] if engines == AUTO else [engines]
    return ",".join([*named, *(f"-{name}" for name in keeping)]) or AUTO


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _is_named(name: str, engines: str) -> bool:
    return name in _split(os.environ.get("SLOPE_FX_ENGINES", "") if engines == AUTO else engines)


def engines_for(
    device: torch.device, dtype: torch.dtype, engines: str = AUTO, products: bool = True
) -> tuple[str, ...]:
    """The names of the allowed engines that support a device and a dtype; ``dense`` if none does.

    An :class:`EngineWarning` gives the reason, once, if an engine cannot run on a device that it
    is made for, or if the only named engine cannot run.

    Args:
        device, dtype: of the tensors.
        engines: the allowed engines, as in :func:`allowed_engines`.
        products: whether the tensors are those of products, or of masks, expand and compress.
    """
    allowed = allowed_engines(engines)
    able: list[str] = []
    for name in allowed:
        engine, named = ENGINES[name], _is_named(name, engines)
        at_home = engine.devices is None or device.type in engine.devices
        if not at_home and not named:
            continue
        reason = _why_not(engine, device, dtype, products)
        if not reason:
            able.append(name)
        # A dtype without products, as that of a mask in expand, is no reason for a warning.
        elif dtype.is_floating_point and engine.warns(allowed, named):
            _warn(name, reason, len(allowed) == 1, at_home and dtype in _USUAL_DTYPES)
    candidates = tuple(
        name
        for name in able
        if _is_named(name, engines)
        or not any(ENGINES[name].yields_to(ENGINES[other]) for other in able)
    )
    return candidates or ("dense",)


_USUAL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _warn(name: str, reason: str, alone: bool, unexpected: bool) -> None:
    if unexpected:
        say_once(f"slope_fx does not use the {name} engine: {reason}.")
    elif alone:
        say_once(f"slope_fx uses the dense engine, because the {name} engine cannot run: {reason}.")


@functools.cache
def _why_not(engine: Engine, device: torch.device, dtype: torch.dtype, products: bool) -> str:
    if not products and engine.around is not None:
        engine = engine.around
    return engine.why_not(device, dtype)


@functools.cache
def say_once(message: str) -> None:
    """Issue an :class:`EngineWarning`, once for each message."""
    warnings.warn(message, EngineWarning, stacklevel=2)


def engines_taking(op: str, n: int, m: int, candidates: tuple[str, ...]) -> tuple[str, ...]:
    """The candidates that compute the product ``op`` for an N:M pattern; ``dense`` if none does."""
    able: list[str] = []
    for name in candidates:
        engine = ENGINES[name]
        if reason := engine.why_not_pattern(n, m):
            say_once(f"slope_fx does not use the {name} engine for {n}:{m}: {reason}.")
        elif not any(engine.repeats(ENGINES[other], op) for other in candidates):
            able.append(name)
    return tuple(able) or ("dense",)


def kept_bytes(values: Tensor) -> int:
    """The bytes of all operands that engines keep for the values of a weight."""
    kept = (engine.operands for engine in ENGINES.values())
    return sum(operands.nbytes(values) for operands in kept if operands is not None)


def forget_operands(values: Tensor) -> None:
    """Remove all operands that engines keep for the values of a weight."""
    for engine in ENGINES.values():
        if engine.operands is not None:
            engine.operands.forget(values)
