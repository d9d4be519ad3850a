"""The engines, and which of them may compute what.

``SLOPE_FX_ENGINES`` limits the choice: names separated by commas are the engines allowed,
names after a minus are forbidden (``cpu``; ``cpu,dense``; ``-cpu``). With one engine left
there is nothing to measure. ``dense`` does what ``cpu-dense`` does, slower, and ``reference``
slower still: unless it is named, the one takes part only where the other can't, the other
not at all.
"""

import functools
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from slope_fx.kernels import cpu, dense, reference, triton
from slope_fx.kernels.cusparselt import Cusparselt
from slope_fx.kernels.errors import ArgumentError, EngineWarning
from slope_fx.kernels.operands import Operands
from slope_fx.kernels.vendor import VendorProducts

Engine = ModuleType | VendorProducts

ENGINES: dict[str, Engine] = {
    "cpu": cpu,
    "cpu-dense": VendorProducts(cpu),
    "triton": triton,
    "triton-dense": VendorProducts(triton),
    "cusparselt": Cusparselt(triton),
    "dense": dense,
    "reference": reference,
}
COMPETING = ("cpu", "cpu-dense", "triton", "triton-dense", "cusparselt", "dense")
AUTO = "auto"
TAKE_WIDER_VALUES = ("triton", "cusparselt")
"""Those whose products take fp32 values beside 16-bit inputs, and round them themselves."""
KEEP_OPERANDS = ("cusparselt",)
"""Those that make an operand of a weight, and may keep it; they are told which graphs train."""


def allowed_engines(engines: str = AUTO) -> tuple[str, ...]:
    """The engines that ``engines`` and the environment allow, best first.

    Args:
        engines: "auto", or names separated by commas. Anything but "auto" overrides
            ``SLOPE_FX_ENGINES``.

    Raises:
        ArgumentError: a name is not an engine's, or none is left.
    """
    source, text = "engine", engines
    if engines == AUTO:
        source, text = "SLOPE_FX_ENGINES", os.environ.get("SLOPE_FX_ENGINES", "")
    return _parse(source, text)


def limited(engines: str) -> str:
    """``engines`` with what the environment says in the place of "auto".

    So a graph that has it is a graph of that environment, in torch.compile's caches too.
    """
    return (os.environ.get("SLOPE_FX_ENGINES", "").strip() or AUTO) if engines == AUTO else engines


def without_operands(engines: str) -> str:
    """``engines`` without those that keep what they make of a weight."""
    allowed = allowed_engines(engines)
    if set(allowed) <= set(KEEP_OPERANDS):
        return "dense"
    keeping = [name for name in KEEP_OPERANDS if name in allowed]
    named = [] if engines == AUTO else [engines]
    return ",".join([*named, *(f"-{name}" for name in keeping)]) or AUTO


@functools.cache
def _parse(source: str, text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name.removeprefix("-") not in ENGINES]
    if unknown:
        raise ArgumentError(
            f"{source}={text!r}: {unknown[0]!r} is not an engine; there are "
            f"{', '.join(ENGINES)}. Allowed are names separated by commas, or -name to forbid one."
        )
    named = tuple(name for name in ENGINES if name in names)
    left = tuple(name for name in named or COMPETING if f"-{name}" not in names)
    if not left:
        raise ArgumentError(f"{source}={text!r} leaves no engine; there are {', '.join(ENGINES)}.")
    return left


def engines_for(
    device: torch.device, dtype: torch.dtype, engines: str = AUTO, products: bool = True
) -> tuple[str, ...]:
    """Those of the allowed engines that can serve such tensors; ``dense`` if none can.

    What can't serve on its own kind of device, or was named alone, is said once with the reason.
    Without ``products`` it is about masks, expand and compress.
    """
    names = allowed_engines(engines)
    able: list[str] = []
    for name in names:
        homes = ENGINES[name].DEVICES
        at_home = homes is None or device.type in homes
        if not at_home and not _is_named(name, engines):
            continue
        reason = _why_not(name, device, dtype, products)
        if not reason:
            able.append(name)
        elif name.endswith("-dense") and name.removesuffix("-dense") in names:
            continue  # for the same reason
        elif not dtype.is_floating_point:
            continue  # a mask on its way through expand; no product
        elif (
            isinstance(ENGINES[name], Cusparselt)
            and not ENGINES[name].unavailable()
            and not _is_named(name, engines)
        ):
            continue  # it never takes that dtype, or such a GPU
        elif at_home and dtype in (torch.float32, torch.bfloat16, torch.float16):
            say_once(f"slope_fx's {name} engine is not used: {reason}.")
        elif len(names) == 1:
            say_once(f"slope_fx's {name} engine was asked for, but {reason}; dense serves.")
    rebuilders = [name for name in able if name.endswith("-dense")]
    if rebuilders and "dense" in able and not _is_named("dense", engines):
        able.remove("dense")  # it does the same, slower
    return tuple(able) or ("dense",)


def _is_named(name: str, engines: str) -> bool:
    text = os.environ.get("SLOPE_FX_ENGINES", "") if engines == AUTO else engines
    return name in [part.strip() for part in text.split(",")]


@functools.cache
def _why_not(name: str, device: torch.device, dtype: torch.dtype, products: bool) -> str:
    engine = ENGINES[name]
    if not products and isinstance(engine, VendorProducts):
        engine = engine.around
    reason: str = engine.why_not(device, dtype)
    return reason


@functools.cache
def say_once(message: str) -> None:
    warnings.warn(message, EngineWarning, stacklevel=2)


def engines_taking(op: str, n: int, m: int, candidates: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the candidates that take such a product; ``dense`` if none does."""
    able: list[str] = []
    for name in candidates:
        engine = ENGINES[name]
        if isinstance(engine, Cusparselt):
            if reason := engine.why_not_pattern(n, m):
                say_once(f"slope_fx's {name} engine is not used for {n}:{m}: {reason}.")
                continue
            if op == "sparse_weight_grad" and any(_twins(engine, other) for other in candidates):
                continue  # it would compute the same
        able.append(name)
    return tuple(able) or ("dense",)


def _twins(engine: VendorProducts, name: str) -> bool:
    """Whether the engine of that name has the same dense products, and nothing else."""
    other = ENGINES[name]
    return type(other) is VendorProducts and other.around is engine.around


def kept_bytes(values: Tensor) -> int:
    """Bytes of what engines keep that they made of a weight's values."""
    return sum(made.nbytes(values) for made in _all_operands())


def forget_operands(values: Tensor) -> None:
    """Let engines forget what they made of a weight's values."""
    for made in _all_operands():
        made.forget(values)


def _all_operands() -> list[Operands]:
    own = [engine.operands for engine in ENGINES.values() if isinstance(engine, Cusparselt)]
    return [cpu.operands, *own]
