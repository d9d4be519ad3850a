"""Back from compressed weights to a plain dense model, and adapters to PEFT."""

import copy
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from slope_fx.compiler import check_choice, compilation_of, detach, sparse_weights
from slope_fx.errors import ArgumentError, UnsupportedError, first_line
from slope_fx.sparse.install import uninstall
from slope_fx.planning.trace import linear_modules
from slope_fx.sparse.weight import SparseWeight, sparse_name, whole

Model = TypeVar("Model", bound=nn.Module)
Adapters = Literal["merge", "drop", "peft"]


def densify(model: Model, adapters: Adapters = "merge", *, inplace: bool = False) -> Model:
    """A plain dense model that computes what ``model`` does: zeros where it is pruned.

    Nothing of slope_fx is left on it: it saves, loads, compiles and trains like any other, dense.

    Args:
        model: what ``compile`` or ``load_pretrained`` returned.
        adapters: "merge" adds those that take part to the weights, whose zeros they fill;
            "drop" leaves them out; "peft" puts a ``peft.PeftModel`` around the dense model, with
            adapters of its own.
        inplace: change ``model`` itself instead of a copy; it must be made dense before its
            parameters are given to another optimizer.

    Returns:
        The dense model; with "peft" a ``peft.PeftModel``.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
        ArgumentError: ``adapters`` is none of its choices.
        UnsupportedError: "peft" where PEFT has no adapter for a layer; or the model can't be copied.
    """
    check_choice("adapters", adapters, get_args(Adapters))
    compilation_of(model)
    if adapters == "peft":
        _adapted(model)  # raises before anything is changed
    dense = model if inplace else _copied(model)
    if adapters != "peft":
        _expand(dense, merge=adapters == "merge")
        return dense
    with tempfile.TemporaryDirectory() as folder:
        export_peft(dense, folder)
        _expand(dense, merge=False)
        return _peft().PeftModel.from_pretrained(dense, folder, is_trainable=True)


def _copied(model: Model) -> Model:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # what a module keeps of its last call may have a graph behind it
        raise UnsupportedError(
            f"the model can't be copied ({type(error).__name__}: {first_line(error)}), as a model "
            "that keeps a result of its last call can't. densify(model, inplace=True) needs no "
            "copy."
        ) from error


def export_peft(
    model: nn.Module, path: str | os.PathLike[str], *, base_model: str | None = None
) -> Path:
    """Write the adapters of ``model`` as a PEFT LoRA adapter.

    ``peft.PeftModel.from_pretrained(dense, path)`` on ``densify(model, "drop")``, or on a
    checkpoint of that, gives the same outputs.

    Args:
        model: what ``compile`` or ``load_pretrained`` returned, its adapters taking part.
        path: the folder to write ``adapter_config.json`` and ``adapter_model.safetensors`` to.
        base_model: name or folder of the dense model, to be put into the configuration.

    Returns:
        The folder.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
        UnsupportedError: it has no adapters at work, or one on something that PEFT knows no LoRA for:
            a bare parameter, the experts of a mixture, some layers of Mamba.
    """
    compilation_of(model)
    adapted = _adapted(model)
    peft = _peft()
    ranks = {path: weight.rank for path, (_, weight) in adapted.items()}
    alphas = {path: weight.scale * (weight.rank or 0) for path, (_, weight) in adapted.items()}
    first = next(iter(adapted))
    config = peft.LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        # A pattern, which PEFT takes for whole paths; a name would be the end of any path.
        target_modules="|".join(map(re.escape, adapted)),
        rank_pattern={f"^{re.escape(p)}$": r for p, r in ranks.items() if r != ranks[first]},
        alpha_pattern={f"^{re.escape(p)}$": a for p, a in alphas.items() if a != alphas[first]},
        fan_in_fan_out=any(not isinstance(m, nn.Linear) for m, _ in adapted.values()),
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    _check_peft_takes(peft, config, model, adapted)
    tensors: dict[str, Tensor] = {}
    for name, (_, weight) in adapted.items():
        assert weight.lora_A is not None
        assert weight.lora_B is not None
        for part, tensor in (("lora_A", weight.lora_A), ("lora_B", weight.lora_B)):
            stored = whole(tensor.detach()).cpu().contiguous().clone()
            tensors[f"base_model.model.{name}.{part}.weight"] = stored
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder


def _check_peft_takes(peft: Any, config: Any, model: nn.Module, names: Iterable[str]) -> None:
    """Raise UnsupportedError where PEFT knows a LoRA for the layer's type, and refuses this layer."""
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


def _adapted(model: nn.Module) -> dict[str, tuple[nn.Module, SparseWeight]]:
    """The modules that PEFT is to give an adapter, by path, with the weights they have one of.

    Raises:
        UnsupportedError: there is none, or one that PEFT can't have.
    """
    active = [w for w in sparse_weights(model).values() if w.adapter_active and w.rank]
    if not active:
        raise UnsupportedError(
            "the model has no adapters that take part: it was compiled without adapter_rank, or "
            "they haven't begun. Nothing can be exported; densify(model, 'drop') is all of it."
        )
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
    """Each sparse weight, with the modules that have it and the attribute it is there."""
    places: dict[SparseWeight, list[tuple[str, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute in _attributes(module):
            weight = module._modules[sparse_name(attribute)]
            assert isinstance(weight, SparseWeight)
            places.setdefault(weight, []).append((path, attribute))
    yield from places.items()


def _attributes(module: nn.Module) -> tuple[str, ...]:
    kind = getattr(type(module), "_slope_kind", None)
    return () if kind is None else kind.attributes


@torch.no_grad()
def _expand(model: nn.Module, *, merge: bool) -> None:
    """Give every layer of ``model`` its dense weight, and take all else of slope_fx away."""

    def dense_of(weight: SparseWeight) -> Tensor:
        matrix = weight.to_dense().view(-1, weight.d_in)
        if merge and weight.adapter_active and weight.lora_A is not None:
            assert weight.lora_B is not None
            a = weight.lora_A.view(weight.stack, -1, weight.d_in)
            b = weight.lora_B.view(weight.stack, weight.d_out, -1)
            # The sum is rounded once, to the weight's own dtype.
            product = weight.scale * torch.bmm(b.double(), a.double())
            matrix = (matrix.double() + product.view_as(matrix)).to(matrix.dtype)
        return weight.layout.to_parameter(matrix).contiguous()

    uninstall(model, dense_of)
    detach(model)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ArgumentError(f"PEFT can't be imported: {error}. `pip install peft`.") from error
    return peft
