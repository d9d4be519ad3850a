"""Load the weights of a dense checkpoint into a compiled model."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from slope_fx.checkpoints.together import Together
from slope_fx.checkpoints.unstored import make_unstored_buffers
from slope_fx.errors import ArgumentError, CheckpointError, StateError
from slope_fx.planning.plan import sparse_name
from slope_fx.record import trainable_record_of
from slope_fx.sparse.blank import fill
from slope_fx.sparse.weight import SparseWeight

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def load_dense(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Load a dense model's weights into a compiled model, in place.

    The result is that of loading the weights before ``compile``: each sparse layer gets new masks
    by the model's mask method, and a new adapter that adds nothing. The model may be sharded, as by
    ``fully_shard``, and may come from the meta device::

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        slope_fx.compile(model, "2:4")
        fully_shard(model)
        model.to_empty(device="cuda")
        model.tie_weights()
        slope_fx.checkpoints.load_dense("path/of/dense/model", model)

    Tensors are read one by one, so a rank holds its shards and one dense tensor. All ranks must
    call this function, with the same files. Buffers that a model computes and does not store, such
    as rotary frequencies, have no content after ``to_empty``. Those of transformers' models are
    made again. A warning names all others, which the caller must make.

    Args:
        path: a folder with safetensors files, as ``save_pretrained`` of transformers writes it, or
            a safetensors file. Tensors have the names of the dense model. transformers' prefix of
            the base model may be missing or added.
        model: the object that ``compile`` or ``load_pretrained`` returned.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned, is frozen, or is on the
            meta device.
        ArgumentError: the model's masks or adapters need calibration or are made from weights.
        CheckpointError: a file cannot be read; or a tensor is missing, unexpected or of another
            shape. The model is then unchanged.
    """
    config = trainable_record_of(model).config
    what = config.needs_calibration
    if config.adapter_init != "zero":
        what = f"adapter_init={config.adapter_init!r}"
    if what:
        raise ArgumentError(
            f"load_dense can't make what {what} asks for. Load the weights before "
            'slope_fx.compile, or compile with mask="magnitude" and adapter_init="zero".'
        )
    targets = _targets(model)
    for names, target in targets:
        tensor = target.values if isinstance(target, SparseWeight) else target
        if tensor.is_meta:
            raise StateError(
                f"{names[0]} is on the meta device. Call model.to_empty(device=...) first."
            )
    together = Together()
    with ExitStack() as stack:
        with together.agreed() if _is_sharded(targets) else nullcontext():
            stored = _open(Path(path), stack)
            sources = _match(Path(path), model, stored, targets)
        make_unstored_buffers(model)
        for name, (_, target) in zip(sources, targets, strict=True):
            _write(target, stored[name].get_tensor(name), config.mask)


def _is_sharded(targets: Iterable[tuple[list[str], SparseWeight | Tensor]]) -> bool:
    tensors = (t.values if isinstance(t, SparseWeight) else t for _, t in targets)
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def _targets(model: nn.Module) -> list[tuple[list[str], SparseWeight | Tensor]]:
    """The sparse weights, dense parameters and stored buffers, each with its dense names."""
    sparse: dict[str, SparseWeight] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = getattr(type(module), "_slope_kind", None)
        for attribute in () if kind is None else kind.attributes:
            name = f"{path}.{attribute}" if path else attribute
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            sparse[name] = module._modules[sparse_name(attribute)]
    tensors = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not any(
            name.startswith((f"{of_layer}_values", f"{of_layer}_sparse.")) for of_layer in sparse
        )
    }
    found: dict[int, tuple[list[str], SparseWeight | Tensor]] = {}
    for name, target in [*sparse.items(), *tensors.items()]:
        found.setdefault(id(target), ([], target))[0].append(name)
    return list(found.values())


def _open(path: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file of each stored tensor, by name."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for index in path.glob("*.safetensors.index.json") if path.is_dir() else ():
        try:
            listed = json.loads(index.read_text())["weight_map"].values()
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of safetensors: {error!r}.") from None
        files = sorted({path / name for name in listed})
    if not files:
        raise CheckpointError(f"{path} has no safetensors file.")
    stored: dict[str, Any] = {}
    for file in files:
        try:
            opened = stack.enter_context(safe_open(str(file), "pt", device="cpu"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} can't be read: {error}.") from None
        stored.update(dict.fromkeys(opened.keys(), opened))
    return stored


def _match(
    path: Path,
    model: nn.Module,
    stored: Mapping[str, Any],
    targets: Iterable[tuple[list[str], SparseWeight | Tensor]],
) -> list[str]:
    """The stored name of each target.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    sources, unused = [], set(stored)
    for names, target in targets:
        others = [name.removeprefix(prefix) for name in names] + [prefix + name for name in names]
        candidates = [name for name in (*names, *others) if name in stored]
        if not candidates:
            raise CheckpointError(
                f"{path} has no tensor {names[0]}, which the model needs. If it is shared with "
                "another parameter, share it again after to_empty(): model.tie_weights()."
            )
        sources.append(candidates[0])
        unused.difference_update(candidates)
        shape = tuple(stored[candidates[0]].get_slice(candidates[0]).get_shape())
        own = target.layout.shape if isinstance(target, SparseWeight) else tuple(target.shape)
        if shape != own:
            raise CheckpointError(f"{path}: {candidates[0]} is {shape}; the model needs {own}.")
    if unused:
        raise CheckpointError(
            f"{path} has {min(unused)}"
            + (f" and {len(unused) - 1} more tensors" if len(unused) > 1 else "")
            + ", for which the model has no place."
        )
    return sources


@torch.no_grad()
def _write(target: SparseWeight | Tensor, tensor: Tensor, mask: object) -> None:
    if isinstance(target, SparseWeight):
        values = target.values
        matrix = target.layout.to_matrix(tensor).to(values.device, values.dtype)
        fill(target, matrix.contiguous(), mask)
        target.note_write()
        return
    if isinstance(target, DTensor):
        # All ranks read the same file, so each takes its own rows and nothing is sent.
        tensor = distribute_tensor(
            tensor, target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(tensor)
