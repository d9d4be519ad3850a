"""``Settings``: backend, engines, regions and passes of a compiled model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict, cast, get_args

import torch
from torch.fx import GraphModule
from typing_extensions import Unpack

from slope_fx.dynamo import BackendFunction
from slope_fx.errors import ArgumentError
from slope_fx.kernels.engines import AUTO, ENGINES, allowed_engines
from slope_fx.passes import NAMES
from slope_fx.planning.config import check_choice
from slope_fx.planning.regions import Region
from slope_fx.sparse.fallback import OnFallback

UserPass = Callable[[GraphModule], GraphModule | None]


class RunOptions(TypedDict, total=False):
    """The fields of :class:`Settings` as keyword arguments of ``compile``."""

    backend: str | BackendFunction | None
    mode: str | None
    options: Mapping[str, Any] | None
    dynamic: bool | None
    fullgraph: bool
    region: Region
    engine: str
    passes: Sequence[Any]
    disable_passes: Sequence[str]
    on_fallback: OnFallback


@dataclass(frozen=True)
class Settings:
    """The settings of a compiled model. Equal settings share one backend object.

    Attributes:
        backend: the torch.compile backend for the rewritten graphs, by name or as a function. With
            None, slope_fx does not compile (see :func:`~slope_fx.rewriting_backend`).
        mode, options, dynamic, fullgraph: as for ``torch.compile``. The options are sorted pairs.
        region: "model" compiles one graph. "blocks" compiles the repeated blocks one by one, in
            little more than a third of the time. Code outside the blocks without sparse linears
            runs in eager mode. "auto" uses the blocks if the model has repeated blocks. A
            transformers model then trains with ``use_cache=False`` by default, and is compiled as
            one graph for calls with a cache of keys and values.
        engine: the allowed engines. "auto" measures all engines on each kind of product and uses
            the fastest. One name ("cpu", "cpu-dense", "dense", "reference") fixes the engine, so
            that a run does not depend on timings. Several names, separated by commas, limit the
            choice. Overrides the environment variable ``SLOPE_FX_ENGINES``.
        passes: your passes on each graph. A pass is a function of a ``torch.fx.GraphModule`` that
            changes it in place or returns another. Your passes run after those of slope_fx. ``...``
            stands for the passes of slope_fx: ``[mine_before, ..., mine_after]``.
        disable_passes: names of passes of slope_fx to skip, to find a faulty pass (see also
            :func:`slope_fx.debug.first_difference`).
        on_fallback: the action if a sparse layer trains with its dense weight rebuilt because no
            pass matched its linear: "warn" once per layer, "error" or "ignore". It is detected
            when a gradient arrives.
    """

    backend: str | BackendFunction | None = "inductor"
    mode: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    dynamic: bool | None = None
    fullgraph: bool = False
    region: Region = "auto"
    engine: str = AUTO
    passes: tuple[Any, ...] = ()
    disable_passes: tuple[str, ...] = ()
    on_fallback: OnFallback = "warn"

    @classmethod
    def of(cls, **given: Unpack[RunOptions]) -> "Settings":
        """Returns the settings from keyword arguments.

        Raises:
            ArgumentError: a backend, engine, mode, option or pass does not exist, or a value is not
                allowed.
        """
        backend, mode = given.get("backend", "inductor"), given.get("mode")
        options = given.get("options")
        if backend is not None:
            resolve(backend)
        check_engine(given.get("engine", AUTO))
        _check_mode(backend, mode, options)
        checked: dict[str, Any] = {
            **given,
            "options": tuple(sorted((options or {}).items())),
            "passes": _checked_passes(given.get("passes", ())),
            "disable_passes": _checked_names(given.get("disable_passes", ())),
        }
        settings = cls(**checked)
        check_choice("region", settings.region, get_args(Region))
        check_choice("on_fallback", settings.on_fallback, get_args(OnFallback))
        check_choice("dynamic", settings.dynamic, (True, False, None))
        check_choice("fullgraph", settings.fullgraph, (True, False))
        try:
            hash(settings)
        except TypeError as error:
            raise ArgumentError(f"backend, options and passes must be hashable: {error}.") from None
        return settings

    def without_effect(self) -> list[str]:
        """The settings that were changed and have no effect with ``backend=None``."""
        idle = {"backend", "region", "on_fallback"}
        return [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if self.backend is None and f.name not in idle and getattr(self, f.name) != f.default
        ]

    @property
    def replays(self) -> bool:
        """Whether the settings enable CUDA graphs."""
        return bool(self.inductor_options().get("triton.cudagraphs"))

    def inductor_options(self) -> dict[str, Any]:
        """The options of Inductor that ``mode`` and ``options`` set."""
        if self.backend != "inductor":
            return {}
        mode: dict[str, Any] = {}
        if self.mode not in (None, "default"):
            from torch._inductor import list_mode_options  # takes seconds

            mode = list_mode_options(self.mode)
        return {**mode, **{name.replace("-", "_"): value for name, value in self.options}}

    def own_passes(self) -> tuple[tuple[UserPass, ...], tuple[UserPass, ...]]:
        """The user's passes before and after the passes of slope_fx."""
        at = self.passes.index(...) if ... in self.passes else -1
        return self.passes[: max(at, 0)], self.passes[at + 1 :]


def _check_mode(
    backend: str | BackendFunction | None, mode: str | None, options: Mapping[str, Any] | None
) -> None:
    if options is not None and not isinstance(options, Mapping):
        raise ArgumentError(f"options is a {type(options).__name__}; it must be a mapping.")
    if mode is not None and options:
        raise ArgumentError("mode and options can't both be given, as for torch.compile.")
    if backend != "inductor" or (mode is None and not options):
        return
    from torch._inductor import config, list_mode_options  # takes seconds

    modes = ["default", *list_mode_options()]
    if mode is not None and mode not in modes:
        raise ArgumentError(f"mode={mode!r}; allowed are {', '.join(map(repr, modes))}.")
    known = config.get_config_copy()
    for name in options or {}:
        if name.replace("-", "_") not in known:
            raise ArgumentError(
                f"options[{name!r}] is not an option of Inductor; torch._inductor.list_options() "
                "lists them."
            )


def _checked_passes(passes: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(passes, (str, bytes)) or not isinstance(passes, Sequence):
        raise ArgumentError(
            f"passes is a {type(passes).__name__}; it must be a list of functions of a "
            "GraphModule, in which `...` stands for the passes of slope_fx."
        )
    for own in passes:
        if own is not ... and not callable(own):
            raise ArgumentError(f"passes has {own!r}, which is neither a function nor `...`.")
    if list(passes).count(...) > 1:
        raise ArgumentError("passes has `...` more than once; it stands for all slope_fx passes.")
    return tuple(passes)


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(names, Iterable):
        raise ArgumentError(
            f"disable_passes is a {type(names).__name__}; it must be a list of {', '.join(NAMES)}."
        )
    given = [names] if isinstance(names, str) else list(names)
    for name in given:
        if name not in NAMES:
            raise ArgumentError(f"disable_passes has {name!r}; there are {', '.join(NAMES)}.")
    return tuple(sorted(set(given)))


def check_engine(engine: object) -> None:
    """Check that the named engines exist, and that a single named engine is available.

    Raises:
        ArgumentError: an engine does not exist or is not available.
    """
    if not isinstance(engine, str) or not engine:
        raise ArgumentError(
            f'engine={engine!r}; allowed are "auto", or names of {", ".join(ENGINES)} '
            "separated by commas."
        )
    named = allowed_engines(engine)
    if len(named) == 1 and engine != AUTO and (reason := ENGINES[named[0]].unavailable()):
        raise ArgumentError(
            f'engine={engine!r} is not available: {reason}. "auto" uses the fastest available.'
        )


def resolve(inner: str | BackendFunction) -> BackendFunction:
    """Returns the function of a torch.compile backend, given by name or as a function.

    Raises:
        ArgumentError: there is no backend with this name.
    """
    if not isinstance(inner, str):
        if not callable(inner):
            raise ArgumentError(
                f"backend={inner!r}; allowed are a torch.compile backend's name, "
                "a function (graph, example_inputs) -> function, or None."
            )
        return inner
    from torch._dynamo.backends.registry import lookup_backend  # takes seconds

    try:
        backend = lookup_backend(inner)
    except Exception as error:
        names = ", ".join(sorted(torch.compiler.list_backends(exclude_tags=())))
        raise ArgumentError(
            f"backend={inner!r} is not a torch.compile backend; there are: {names}."
        ) from error
    return cast(BackendFunction, backend)
