"""Export the adapters of a compiled model to PEFT."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from slope_fx.errors import ArgumentError, UnsupportedError, first_line
from slope_fx.planning.plan import sparse_name
from slope_fx.planning.trace import linear_modules
from slope_fx.record import record_of, sparse_weights
from slope_fx.sparse.shards import whole
from slope_fx.sparse.weight import SparseWeight


def export_peft(
    model: nn.Module, path: str | os.PathLike[str], *, base_model: str | None = None
) -> Path:
    """Write the adapters of ``model`` as a PEFT LoRA adapter.

    ``peft.PeftModel.from_pretrained(dense, path)`` then has the same outputs as ``model``, where
    ``dense`` is ``densify(model, "drop")`` or a checkpoint of it. ``slope_fx.json`` and the masks
    are written beside the adapter, so that ``slope-fx convert`` makes the sparse model of the two
    again, bit for bit.

    Args:
        model: the object that ``compile`` or ``load_pretrained`` returned, with active adapters.
        path: folder for ``adapter_config.json`` and ``adapter_model.safetensors``.
        base_model: name or folder of the dense model, stored in the configuration.

    Returns:
        The folder.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
        UnsupportedError: no adapter is active, or PEFT has no LoRA for the layer of an adapter,
            such as a bare parameter, the experts of a mixture, or some layers of Mamba.
        ArgumentError: PEFT cannot be imported.
    """
    record_of(model)
    layers = adapted(model)
    peft = library()
    ranks = {path: weight.rank for path, (_, weight) in layers.items()}
    alphas = {path: weight.scale * (weight.rank or 0) for path, (_, weight) in layers.items()}
    first = next(iter(layers))
    config = peft.LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        # A regular expression, which PEFT matches against complete paths. A name would match the
        # end of any path.
        target_modules="|".join(map(re.escape, layers)),
        rank_pattern={f"^{re.escape(p)}$": r for p, r in ranks.items() if r != ranks[first]},
        alpha_pattern={f"^{re.escape(p)}$": a for p, a in alphas.items() if a != alphas[first]},
        fan_in_fan_out=any(not isinstance(m, nn.Linear) for m, _ in layers.values()),
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    _check_peft_takes(peft, config, model, layers)
    tensors: dict[str, Tensor] = {}
    for name, (_, weight) in layers.items():
        for part in ("lora_A", "lora_B"):
            stored = whole(getattr(weight, part).detach()).cpu().contiguous().clone()
            tensors[f"base_model.model.{name}.{part}.weight"] = stored
    from safetensors.torch import save_file

    from slope_fx.checkpoints.pair import describe_pair  # which imports this module

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    describe_pair(model, folder)
    return folder


def _check_peft_takes(peft: Any, config: Any, model: nn.Module, names: Iterable[str]) -> None:
    """Check that PEFT accepts LoRA for each layer.

    Raises:
        UnsupportedError: PEFT supports the type of a layer, but refuses this layer.
    """
    check = getattr(peft.tuners.tuners_utils, "_check_lora_target_modules_mamba", None)
    if check is None:
        return
    for name in names:
        try:
            check(config, model, name.rpartition(".")[2])
        except ValueError as error:
            raise UnsupportedError(
                f"{name}: {first_line(error)} Merge the adapters instead: densify(model, 'merge')."
            ) from None


def adapted(model: nn.Module) -> dict[str, tuple[nn.Module, SparseWeight]]:
    """The modules with an active adapter, by path, and their sparse weights.

    Raises:
        UnsupportedError: no adapter is active, or PEFT has no LoRA for a module.
    """
    active = [w for w in sparse_weights(model).values() if w.adapter_active and w.rank]
    if not active:
        raise UnsupportedError(
            "the model has no adapters that take part: it was compiled without adapter_rank, or "
            "they haven't begun. There is nothing to export: densify(model, 'drop') gives the "
            "whole model."
        )
    for weight in active:
        if isinstance(weight, SparseWeight):
            weight.check_faded()
    linears = {id(module) for module in linear_modules(model).values()}
    found = {}
    for weight, paths in _places(model):
        if not (weight.adapter_active and weight.rank):
            continue
        for path, attribute in paths:
            module = model.get_submodule(path)
            if id(module) not in linears or attribute != "weight":
                raise UnsupportedError(
                    f"{weight.name} is not the weight of a linear module, and PEFT has no LoRA "
                    "for it. Merge the adapters instead: densify(model, 'merge')."
                )
            found[path] = (module, weight)
    return found


def _places(model: nn.Module) -> Iterator[tuple[SparseWeight, list[tuple[str, str]]]]:
    """Yields each sparse weight with the (module path, attribute) pairs where it is used."""
    places: dict[SparseWeight, list[tuple[str, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute in _attributes(module):
            weight = cast(SparseWeight, module._modules[sparse_name(attribute)])
            places.setdefault(weight, []).append((path, attribute))
    yield from places.items()


def _attributes(module: nn.Module) -> tuple[str, ...]:
    kind = getattr(type(module), "_slope_kind", None)
    return () if kind is None else kind.attributes


def library() -> Any:
    """Returns the module ``peft``.

    Raises:
        ArgumentError: PEFT cannot be imported.
    """
    try:
        import peft
    except ImportError as error:
        raise ArgumentError(f"PEFT can't be imported: {error}. `pip install peft`.") from error
    return peft
