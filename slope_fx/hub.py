"""Configurations and classes of transformers, which is an optional dependency."""

import importlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from slope_fx.errors import ArgumentError, first_line

QUANT_METHOD = "slope_fx"
"""The ``quant_method`` of a checkpoint of slope_fx in its ``config.json``."""
_WITHOUT_IMPORT = "import_slope_fx_first.safetensors"


def transformers() -> Any:
    """Returns the module ``transformers``.

    Raises:
        ArgumentError: transformers cannot be imported.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ArgumentError(
            f"transformers is needed and can't be imported: {error}. `pip install transformers`."
        ) from error


def tokenizer_of(source: str | os.PathLike[str]) -> Any:
    """Returns the tokenizer in a folder or on the hub, or None if there is none.

    Raises:
        ArgumentError: there is one, and it can't be read.
    """
    here = Path(source)
    files = ("tokenizer.json", "tokenizer_config.json")
    try:
        tokenizer = transformers().AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the file formats raise many types
        there = any((here / name).is_file() for name in files)
        if there or not (here.is_dir() or isinstance(error, OSError)):
            raise ArgumentError(
                f"source={os.fspath(source)!r}: its tokenizer can't be read: {first_line(error)}"
            ) from error
        return None
    # Of a configuration alone, transformers makes a tokenizer without words.
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    return tokenizer if words else None


def config_of(source: str | os.PathLike[str]) -> Any:
    """Returns the configuration in a folder, in a file, or on the hub.

    Raises:
        ArgumentError: there is no configuration.
    """
    library = transformers()
    where = os.fspath(source)
    if not os.path.exists(where) and (where.endswith(".json") or os.path.isabs(where)):
        raise ArgumentError(f"source={where!r} does not exist.")
    try:
        return library.AutoConfig.from_pretrained(where)
    except Exception as error:  # errors of the hub library, its validation, or JSON
        raise ArgumentError(
            f"source={where!r} is neither a config.json, a folder with one or with a checkpoint of "
            f"slope_fx, nor a model on the hub: {first_line(error)}"
        ) from None


def mark_configuration(folder: Path) -> None:
    """Let the ``config.json`` of a checkpoint say that slope_fx opens it.

    Without slope_fx, transformers would only warn of an unknown ``quant_method``, find the sparse
    weights missing, and initialize them at random. So the file also names, as the file of the
    weights, one that does not exist. The quantizer of slope_fx disregards that name.
    """
    file = folder / "config.json"
    data = json.loads(file.read_text())
    data["quantization_config"] = {"quant_method": QUANT_METHOD}
    data["transformers_weights"] = _WITHOUT_IMPORT
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def unmark(config: Any) -> None:
    """Remove from a configuration what :func:`mark_configuration` put into its file."""
    told = getattr(config, "quantization_config", None)
    method = told.get("quant_method") if isinstance(told, dict) else None
    if method == QUANT_METHOD:
        del config.quantization_config
    if getattr(config, "transformers_weights", None) == _WITHOUT_IMPORT:
        del config.transformers_weights


def class_of(config: Any) -> Any:
    """The model class that a configuration names, or an Auto class if it names none."""
    library = transformers()
    for name in config.architectures or ():
        kind = getattr(library, str(name), None)
        if isinstance(kind, type) and issubclass(kind, library.PreTrainedModel):
            return kind
    known = type(config) in library.AutoModelForCausalLM._model_mapping
    return library.AutoModelForCausalLM if known else library.AutoModel


def takes_cache(model: nn.Module) -> bool:
    """Whether the forward of ``model`` accepts ``use_cache``.

    It accepts the argument by name, or in ``**kwargs`` if its configuration has ``use_cache``.
    """
    if getattr(model, "config", None) is None:
        return False
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        return True
    hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return hands_on and _cache_setting(model) is not None


def cache_by_default(model: nn.Module) -> bool:
    """Whether ``model`` uses a cache of keys and values by default."""
    return bool(_cache_setting(model))


def _cache_setting(model: nn.Module) -> Any:
    config: Any = model.config
    own = getattr(config, "use_cache", None)
    text = getattr(config, "get_text_config", None)  # multimodal models have a text configuration
    return own if own is not None or text is None else getattr(text(), "use_cache", None)
