"""Register with transformers when it is imported, without importing it."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_QUANTIZERS = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Let ``from_pretrained`` open checkpoints of slope_fx, from the import of transformers on."""
    if _QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Registers after the module of the quantizers was imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _QUANTIZERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            loader.exec_module = exec_module
        return spec


def _register() -> None:
    # In a module of its own, because it imports transformers.
    importlib.import_module("slope_fx.integrations.quantizer").register()
