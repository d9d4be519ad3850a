"""What a backend is asked to do, checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch.fx import GraphModule

from slope_fx.errors import ArgumentError, EngineError
from slope_fx.kernels.engines import AUTO, ENGINES, allowed_engines
from slope_fx.passes import NAMES, OFF

CompiledFunction = Callable[..., Any]
BackendFunction = Callable[[GraphModule, Sequence[Any]], CompiledFunction]
UserPass = Callable[[GraphModule], GraphModule | None]


@dataclass(frozen=True)
class Settings:
    """All that a backend's work depends on, besides the graph; equal settings, one backend.

    Attributes:
        inner: what compiles the rewritten graph.
        engine: what may compute the sparse products.
        mode, options: as of torch.compile, for ``inner``.
        passes: the user's own, ``...`` standing for ours.
        disabled: those of ours that are left out.
    """

    inner: str | BackendFunction = "inductor"
    engine: str = AUTO
    mode: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    passes: tuple[Any, ...] = ()
    disabled: tuple[str, ...] = ()

    @property
    def replays(self) -> bool:
        """Whether CUDA graphs are asked for."""
        return bool(self.inductor_options().get("triton.cudagraphs"))

    def inductor_options(self) -> dict[str, Any]:
        """What ``mode`` and ``options`` set of Inductor's configuration."""
        if self.inner != "inductor":
            return {}
        mode = {} if self.mode in (None, "default") else list_mode_options(self.mode)
        return {**mode, **{name.replace("-", "_"): value for name, value in self.options}}

    def own_passes(self) -> tuple[tuple[UserPass, ...], tuple[UserPass, ...]]:
        """The user's passes ahead of ours, and after."""
        at = self.passes.index(...) if ... in self.passes else -1
        return self.passes[: max(at, 0)], self.passes[at + 1 :]


def make_settings(
    inner: str | BackendFunction,
    engine: str,
    mode: str | None,
    options: Mapping[str, Any] | None,
    passes: Sequence[Any],
    disable_passes: Sequence[str],
    enable_passes: Sequence[str],
) -> Settings:
    """The settings, checked.

    Raises:
        ArgumentError: see :func:`rewriting_backend`.
    """
    resolve(inner)
    check_engine(engine)
    _check_mode(inner, mode, options)
    disabled = _checked_names("disable_passes", disable_passes)
    enabled = _checked_names("enable_passes", enable_passes)
    if both := sorted(disabled & enabled):
        raise ArgumentError(f"{both[0]!r} is both in disable_passes and in enable_passes.")
    settings = Settings(
        inner, engine, mode, tuple(sorted((options or {}).items())),
        _checked_passes(passes), tuple(sorted(disabled | (set(OFF) - enabled))),
    )  # fmt: skip
    try:
        hash(settings)
    except TypeError as error:
        raise ArgumentError(f"backend, options and passes must be hashable: {error}.") from None
    return settings


def _check_mode(
    inner: str | BackendFunction, mode: str | None, options: Mapping[str, Any] | None
) -> None:
    if options is not None and not isinstance(options, Mapping):
        raise ArgumentError(f"options is a {type(options).__name__}; it must be a mapping.")
    if mode is not None and options:
        raise ArgumentError("mode and options can't both be given, as for torch.compile.")
    if inner != "inductor":
        return
    modes = ["default", *list_mode_options()]
    if mode is not None and mode not in modes:
        raise ArgumentError(f"mode={mode!r}; allowed are {', '.join(map(repr, modes))}.")
    known = inductor_config.get_config_copy()
    for name in options or {}:
        if name.replace("-", "_") not in known:
            raise ArgumentError(
                f"options[{name!r}] is not an option of Inductor's; torch._inductor.list_options() "
                "has them."
            )


def _checked_passes(passes: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(passes, (str, bytes)) or not isinstance(passes, Sequence):
        raise ArgumentError(
            f"passes is a {type(passes).__name__}; it must be a list of functions of a "
            "GraphModule, with ... in the place of slope_fx's own."
        )
    for own in passes:
        if own is not ... and not callable(own):
            raise ArgumentError(f"passes has {own!r}, which is neither a function nor `...`.")
    if list(passes).count(...) > 1:
        raise ArgumentError("passes has `...` more than once; it stands for slope_fx's own.")
    return tuple(passes)


def _checked_names(argument: str, names: Sequence[str]) -> set[str]:
    given = [names] if isinstance(names, str) else list(names)
    for name in given:
        if name not in NAMES:
            raise ArgumentError(f"{argument} has {name!r}; there are {', '.join(NAMES)}.")
    return set(given)


def check_engine(engine: object) -> None:
    """See that ``engine`` names engines that exist, and that a lone one can run here.

    Raises:
        ArgumentError: it doesn't, or it can't.
    """
    if not isinstance(engine, str) or not engine:
        raise ArgumentError(
            f'engine={engine!r}; allowed are "auto", or names of {", ".join(ENGINES)} '
            "separated by commas."
        )
    try:
        named = allowed_engines(engine)
    except EngineError as error:
        raise ArgumentError(str(error)) from None
    if len(named) == 1 and engine != AUTO and (reason := ENGINES[named[0]].unavailable()):
        raise ArgumentError(
            f'engine={engine!r} can\'t be had: {reason}. "auto" takes the best there is.'
        )


def resolve(inner: str | BackendFunction) -> BackendFunction:
    if not isinstance(inner, str):
        if not callable(inner):
            raise ArgumentError(
                f"backend={inner!r}; allowed are a torch.compile backend's name, "
                "a function (graph, example_inputs) -> function, or None."
            )
        return inner
    try:
        backend = lookup_backend(inner)
    except Exception as error:
        names = ", ".join(sorted(torch.compiler.list_backends(exclude_tags=())))
        raise ArgumentError(
            f"backend={inner!r} is not a torch.compile backend; there are: {names}."
        ) from error
    return cast(BackendFunction, backend)
