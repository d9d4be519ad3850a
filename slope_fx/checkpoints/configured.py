"""A new model of transformers, made from its configuration without memory for its weights."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from slope_fx.checkpoints.manifest import Manifest
from slope_fx.errors import CheckpointError, first_line
from slope_fx.hub import unmark


def from_configuration(folder: Path, manifest: Manifest) -> nn.Module:
    """The transformers model of ``config.json``. Its parameters have no data, its buffers do."""
    if not manifest.transformers:
        raise CheckpointError(
            f"{folder} holds a {manifest.model_class}, which is not a model of transformers: pass "
            "model=, a new dense one made as for slope_fx.compile."
        )
    try:
        transformers = importlib.import_module("transformers")
        initialization = importlib.import_module("transformers.initialization")
    except ImportError as error:
        raise CheckpointError(f"{folder} needs transformers 5: {error}.") from error
    kind = getattr(transformers, str(manifest.model_class), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{folder} holds a {manifest.model_class}, which transformers "
            f"{transformers.__version__} doesn't have. Install a version that does."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} can't be read: {first_line(error)}"
        ) from None
    unmark(config)
    with torch.random.fork_rng(devices=[]), initialization.no_init_weights(), _WithoutData():
        model: nn.Module = kind(config)
    model.tie_weights()  # type: ignore[operator]
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


class _WithoutData(TorchFunctionMode):
    """Lets ``torch.empty`` and all parameters of new modules be on the meta device.

    Buffers that are computed, such as rotary frequencies, get their data. Checkpoints lack them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)

    def __enter__(self) -> "_WithoutData":
        on_meta: Any = self._on_meta
        self._handle = register_module_parameter_registration_hook(on_meta)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._handle.remove()

    def _on_meta(
        self, module: nn.Module, name: str, parameter: nn.Parameter | None
    ) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        if parameter not in self._made:  # modules may share it
            made = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            made.__dict__.update(parameter.__dict__)
            self._made[parameter] = made
        shared: nn.Parameter = self._made[parameter]
        return shared
