"""Convert between dense models on disk, sparse checkpoints and PEFT adapters."""

import json
import os
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from slope_fx.checkpoints import dcp_files, load_pretrained, save_pretrained
from slope_fx.checkpoints.files import replaced_whole
from slope_fx.checkpoints.manifest import MANIFEST
from slope_fx.checkpoints.pair import sparse_of_pair
from slope_fx.compiler import compile
from slope_fx.densify import densify
from slope_fx.errors import ArgumentError, ArgumentWarning, UnsupportedError, first_line
from slope_fx.frozen.freeze import Values
from slope_fx.frozen.freeze import freeze as freeze_
from slope_fx.hub import class_of, config_of, tokenizer_of
from slope_fx.integrations import peft
from slope_fx.integrations.peft import export_peft
from slope_fx.planning.config import AdapterRank, Sparsity, check_choice

Kind = Literal["sparse", "dense", "peft", "dcp"]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Kind,
    *,
    sparsity: Sparsity | None = None,
    adapter_rank: AdapterRank = None,
    adapter_init: str | None = None,
    adapters: Literal["merge", "drop"] | None = None,
    freeze: bool = False,
    values: Values = "float",
    group: int | None = None,
    dtype: str | None = None,
) -> dict[str, Path]:
    """Convert the model in ``source`` to another kind of checkpoint in ``target``.

    Args:
        source: a dense transformers model (a folder or a hub name), a sparse checkpoint, a PEFT
            LoRA adapter with the name of its base model in its configuration, or a folder in which
            ``torch.distributed.checkpoint`` saved a TrainingState.
        target: a new or empty folder.
        to: "sparse": a sparse checkpoint. "dense": a dense transformers model. "peft": a PEFT
            adapter in ``target``, and its dense base model in ``target`` + "-base". "dcp": a
            TrainingState, for ``load({"training": TrainingState(...)})``; its source is a sparse
            checkpoint. Between "sparse" and "dcp" the training state is kept.
        sparsity, adapter_rank, adapter_init: as for :func:`slope_fx.compile`, used for "sparse".
            None: "2:4", no adapters, "zero". A PEFT adapter keeps its rank, and is active from the
            first step. One that :func:`slope_fx.export_peft` wrote becomes the model that it is
            of, bit for bit.
        adapters: for "dense": "merge" (the default) adds the adapters to the weights, "drop" omits
            them.
        freeze: for "sparse": whether to freeze the model (:func:`slope_fx.freeze`). The source may
            then be a sparse checkpoint too.
        values, group, dtype: with ``freeze``, as for :func:`slope_fx.freeze`. With quantised
            values, ``adapter_rank`` is the rank of the adapters that make up for the error.

    Returns:
        Kind -> written folder.

    Raises:
        ArgumentError: ``source`` is none of these, or ``target`` is not empty.
        CheckpointError: a file cannot be read or written. ``target`` is then as it was.
        SlopeError: as for ``compile``, ``load_pretrained``, ``densify`` and ``export_peft``.
    """
    check_choice("to", to, get_args(Kind))
    check_choice("adapters", adapters, (None, "merge", "drop"))
    source, target = Path(source), Path(target)
    base = target.with_name(f"{target.name}-base")
    for folder in (target, base) if to == "peft" else (target,):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ArgumentError(f"target={str(folder)!r} exists and is not an empty folder.")
    kind = _kind_of(source)
    if kind == to and not freeze:
        raise ArgumentError(f"{source} is {to} already.")
    if freeze and to != "sparse":
        raise ArgumentError(f'freeze was given with to={to!r}; it needs to="sparse".')
    more = {"dtype": dtype, "values": None if values == "float" else values, "group": group}
    for name, argument in more.items():
        if argument is not None and not freeze:
            raise ArgumentError(f"{name} was given without freeze, which it belongs to.")
    given = {"sparsity": sparsity, "adapter_rank": adapter_rank, "adapter_init": adapter_init,
             "adapters": adapters}  # fmt: skip
    init = adapter_init or "zero"
    used = _used(source, kind, to)
    if freeze and values != "float":
        used.add("adapter_rank")
    elif freeze and init == "zero":
        used.discard("adapter_rank")  # an adapter that was never trained is not kept
    for argument in (n for n, value in given.items() if value is not None and n not in used):
        warnings.warn(
            f"{argument} has no effect on the way from {kind} to {to}.",
            ArgumentWarning,
            stacklevel=2,
        )
    if "dcp" in (kind, to):
        if freeze:
            raise ArgumentError(f"{source} is dcp. Convert it to sparse first, then freeze that.")
        if (kind, to) == ("dcp", "sparse"):
            return {"sparse": dcp_files.to_checkpoint(source, target, tokenizer_of(source))}
        if (kind, to) == ("sparse", "dcp"):
            return {"dcp": dcp_files.from_checkpoint(source, target, tokenizer_of(source))}
        raise ArgumentError(f"there is no way from {kind} to {to}. Convert to sparse first.")
    tokenizer = tokenizer_of(source)
    if to == "sparse":
        if kind == "sparse" and values == "float" and group is None:
            # Without what training needs, and mapped.
            model = load_pretrained(source, frozen=True, dtype=dtype, backend=None)
            return {"sparse": save_pretrained(model, target, tokenizer=tokenizer)}
        if kind == "sparse":
            model = load_pretrained(source, backend=None)
        elif _is_pair(source, kind):
            model = sparse_of_pair(_dense(_base_of(source)), source)
        else:
            model = _compiled(source, kind, sparsity or "2:4", adapter_rank, init)
        if freeze:
            rank = adapter_rank if values != "float" else None
            freeze_(model, dtype=dtype, values=values, group=group, adapter_rank=rank)
        return {"sparse": save_pretrained(model, target, tokenizer=tokenizer)}
    if kind != "sparse":
        if to == "dense":
            return {"dense": _save_dense(_merged(source), target, tokenizer_of(source))}
        raise ArgumentError(
            f"{source} is a dense model, which has no adapters for PEFT. Convert it to sparse "
            "first, with --adapter-rank and --adapter-init svd."
        )
    model = load_pretrained(source, backend=None)
    if to == "dense":
        model = densify(model, adapters or "merge", inplace=True)
        return {"dense": _save_dense(model, target, tokenizer)}
    with replaced_whole(target) as folder:
        export_peft(model, folder, base_model=str(base.absolute()))
        _save_dense(densify(model, "drop"), base, tokenizer)  # before target has its name
    return {"peft": target, "dense": base}


def _is_pair(source: Path, kind: Kind) -> bool:
    """Whether a PEFT adapter is one that ``export_peft`` wrote."""
    return kind == "peft" and (source / MANIFEST).is_file()


def _used(source: Path, kind: Kind, to: Kind) -> set[str]:
    """The arguments that have an effect on the way from a kind to another."""
    if kind == "dense" and to == "sparse":
        return {"sparsity", "adapter_rank", "adapter_init"}
    if kind == "peft" and to == "sparse" and not _is_pair(source, kind):
        return {"sparsity"}
    return {"adapters"} if kind == "sparse" and to == "dense" else set()


def _kind_of(source: Path) -> Kind:
    if (source / "adapter_config.json").is_file():
        return "peft"  # also with a manifest beside it
    if (source / MANIFEST).is_file():
        return "sparse"
    return "dcp" if dcp_files.is_dcp(source) else "dense"


def _compiled(
    source: Path,
    kind: Kind,
    sparsity: Sparsity,
    rank: AdapterRank,
    init: Any,
) -> nn.Module:
    if kind == "dense":
        return compile(
            _dense(str(source)), sparsity, adapter_rank=rank, adapter_init=init, backend=None
        )
    peft_model = _adapted(source)
    factors = _factors(peft_model)
    ranks = {len(a) for a, _ in factors.values()}
    if len(ranks) > 1 or not ranks:
        raise UnsupportedError(
            f"{source} has adapters of ranks {sorted(ranks)}; slope_fx has one rank for all. "
            "Merge them: slope-fx convert ... --to dense."
        )
    (own,) = ranks
    unused = set(factors)

    def adapter(name: str, weight: Tensor, mask: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        unused.discard(name)
        if name in factors:
            return factors[name]
        # A layer without a PEFT adapter gets a new one with B = 0, and a random A so that B trains.
        return torch.randn(rank, weight.shape[1]), torch.zeros(weight.shape[0], rank)

    model = compile(
        peft_model.unload(), sparsity, adapter_rank=own, adapter_init=adapter, backend=None
    )
    if unused:
        raise UnsupportedError(
            f"{source} has an adapter on {sorted(unused)[0]}, which stays dense and so has no "
            "place for it. Choose it in sparsity=, or merge: slope-fx convert ... --to dense."
        )
    return model


_UNKNOWN_PARTS = ("lora_embedding_A", "lora_magnitude_vector", "trainable_tokens_delta")
_NOT_OURS = "which slope_fx has no place for. Merge it: slope-fx convert ... --to dense."


def _factors(peft_model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A and scale * B of each adapted layer, by its name in the base model.

    Raises:
        UnsupportedError: the adapter has parts that slope_fx does not support.
    """
    found = {}
    config = peft_model.peft_config["default"]
    for path, module in peft_model.base_model.model.named_modules():
        # A PEFT layer may have other parts than A and B. Containers of unused parts are empty.
        more = [n for n in _UNKNOWN_PARTS if len(getattr(module, n, ()) or ())]
        if more:
            raise UnsupportedError(f"{path} has {more[0]}, {_NOT_OURS}")
        factor = module.lora_B["default"] if "default" in getattr(module, "lora_B", ()) else None
        if getattr(factor, "bias", None) is not None:
            raise UnsupportedError(f"{path} has a lora_bias, {_NOT_OURS}")
    for name in ("use_dora", "alora_invocation_tokens", "trainable_token_indices"):
        if getattr(config, name, None):
            raise UnsupportedError(f"the adapter has {name}, {_NOT_OURS}")
    for path, module in peft_model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[path] = (a.detach(), b.detach() * module.scaling["default"])
    return found


def _base_of(source: Path) -> str:
    """The name of the base model of an adapter."""
    try:
        told = json.loads((source / "adapter_config.json").read_text())
    except ValueError as error:
        raise ArgumentError(f"{source}/adapter_config.json is not JSON: {error}.") from None
    base = told.get("base_model_name_or_path")
    if not base or told.get("peft_type") != "LORA":
        raise ArgumentError(
            f"{source}/adapter_config.json must be of a LoRA adapter, and name its base model "
            f"(base_model_name_or_path); it has peft_type={told.get('peft_type')!r} and "
            f"base_model_name_or_path={base!r}."
        )
    return str(base)


def _adapted(source: Path) -> Any:
    library = peft.library()
    base_model = _dense(_base_of(source))
    try:
        return library.PeftModel.from_pretrained(base_model, source)
    except Exception as error:
        raise ArgumentError(f"{source} can't be loaded by PEFT: {first_line(error)}") from error


def _merged(source: Path) -> nn.Module:
    model: nn.Module = _adapted(source).merge_and_unload()
    return model


def _dense(name: str) -> nn.Module:
    config = config_of(name)
    try:
        model, told = class_of(config).from_pretrained(
            name, dtype=getattr(config, "dtype", None), output_loading_info=True
        )
    except Exception as error:  # transformers and its file formats raise many types
        raise ArgumentError(
            f"source={name!r} can't be loaded by transformers: {first_line(error)}"
        ) from error
    wrong = sorted({*map(str, told["missing_keys"]), *map(str, told["mismatched_keys"])})
    if wrong:
        raise ArgumentError(
            f"source={name!r} lacks {wrong[0]}"
            + (f" and {len(wrong) - 1} more weights" if len(wrong) > 1 else "")
            + " of the model in its config.json; transformers would initialise them at random."
        )
    loaded: nn.Module = model
    return loaded


def _save_dense(model: nn.Module, folder: Path, tokenizer: Any) -> Path:
    with replaced_whole(folder) as partial:
        model.save_pretrained(partial)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return folder
