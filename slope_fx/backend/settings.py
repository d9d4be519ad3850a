"""How a compiled model is run: the backend, the engines, the regions, the passes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict, cast, get_args

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
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
    """How a model is run. Equal settings have one backend.

    Attributes:
        backend: what compiles the rewritten graphs: any torch.compile backend, by name or as a
            function. None leaves compiling to you (see :func:`~slope_fx.rewriting_backend`).
        mode, options, dynamic, fullgraph: as of ``torch.compile``; options as sorted pairs.
        region: "model" compiles one graph; "blocks" compiles the repeated blocks one by one, in
            little more than a third of the time, and what is outside of them and has no sparse
            linear stays eager. "auto" takes the blocks if the model has any that repeat. A model
            of transformers is then called with ``use_cache=False`` while it trains, unless you
            say otherwise, and is compiled as a whole where a cache of keys and values is used.
        engine: what computes the sparse products. "auto" measures the engines on each kind of
            product and takes the fastest. A name ("cpu", "cpu-dense", "dense", "reference") fixes
            it, so that a run doesn't depend on timings; several names, with commas, limit the
            choice. Overrides the environment's ``SLOPE_FX_ENGINES``.
        passes: your own passes over each graph, functions of a ``torch.fx.GraphModule`` that
            change it in place, or return another. They run after the passes of slope_fx. To run
            some before, write ``...`` where those are: ``[mine_before, ..., mine_after]``.
        disable_passes: names of passes of slope_fx to leave out, to find which is at fault (see
            also :func:`slope_fx.debug.first_difference`).
        on_fallback: what to do when a sparse layer trains with its dense weight rebuilt because
            no pass saw its linear: "warn" once a layer, "error", "ignore". It shows when a
            gradient arrives there.
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
        """The settings that a caller gave, checked.

        Raises:
            ArgumentError: there is no backend, engine, mode, option or pass of that name, or a
                value isn't allowed.
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
        """The names of what was set, and has no effect with ``backend=None``."""
        idle = {"backend", "region", "on_fallback"}
        return [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if self.backend is None and f.name not in idle and getattr(self, f.name) != f.default
        ]

    @property
    def replays(self) -> bool:
        """Whether CUDA graphs are asked for."""
        return bool(self.inductor_options().get("triton.cudagraphs"))

    def inductor_options(self) -> dict[str, Any]:
        """What ``mode`` and ``options`` set of Inductor's configuration."""
        if self.backend != "inductor":
            return {}
        mode = {} if self.mode in (None, "default") else list_mode_options(self.mode)
        return {**mode, **{name.replace("-", "_"): value for name, value in self.options}}

    def own_passes(self) -> tuple[tuple[UserPass, ...], tuple[UserPass, ...]]:
        """The user's passes ahead of ours, and after."""
        at = self.passes.index(...) if ... in self.passes else -1
        return self.passes[: max(at, 0)], self.passes[at + 1 :]


def _check_mode(
    backend: str | BackendFunction | None, mode: str | None, options: Mapping[str, Any] | None
) -> None:
    if options is not None and not isinstance(options, Mapping):
        raise ArgumentError(f"options is a {type(options).__name__}; it must be a mapping.")
    if mode is not None and options:
        raise ArgumentError("mode and options can't both be given, as for torch.compile.")
    if backend != "inductor":
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


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    given = [names] if isinstance(names, str) else list(names)
    for name in given:
        if name not in NAMES:
            raise ArgumentError(f"disable_passes has {name!r}; there are {', '.join(NAMES)}.")
    return tuple(sorted(set(given)))


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
    named = allowed_engines(engine)
    if len(named) == 1 and engine != AUTO and (reason := ENGINES[named[0]].unavailable()):
        raise ArgumentError(
            f'engine={engine!r} can\'t be had: {reason}. "auto" takes the best there is.'
        )


def resolve(inner: str | BackendFunction) -> BackendFunction:
    """The function of a torch.compile backend.

    Raises:
        ArgumentError: there is no backend of that name.
    """
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
