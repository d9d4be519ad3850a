"""What is needed of transformers, where it may not be installed: configurations and classes."""

import importlib
import os
from typing import Any

from slope_fx.errors import ArgumentError, first_line


def transformers() -> Any:
    """The library.

    Raises:
        ArgumentError: it can't be imported.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ArgumentError(
            f"transformers is needed and can't be imported: {error}. `pip install transformers`."
        ) from error


def config_of(source: str | os.PathLike[str]) -> Any:
    """The configuration in a folder, in a file, or on the hub.

    Raises:
        ArgumentError: there is none.
    """
    library = transformers()
    where = os.fspath(source)
    if not os.path.exists(where) and (where.endswith(".json") or os.path.isabs(where)):
        raise ArgumentError(f"source={where!r} is not there.")
    try:
        return library.AutoConfig.from_pretrained(where)
    except Exception as error:  # of the hub's library, of its validation, of JSON
        raise ArgumentError(
            f"source={where!r} is neither a config.json, a folder with one or with a checkpoint of "
            f"slope_fx, nor a model on the hub: {first_line(error)}"
        ) from None


def class_of(config: Any) -> Any:
    """The model's class that a configuration names; an Auto class if it names none."""
    library = transformers()
    for name in config.architectures or ():
        kind = getattr(library, str(name), None)
        if isinstance(kind, type) and issubclass(kind, library.PreTrainedModel):
            return kind
    known = type(config) in library.AutoModelForCausalLM._model_mapping
    return library.AutoModelForCausalLM if known else library.AutoModel
