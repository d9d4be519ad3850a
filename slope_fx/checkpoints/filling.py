"""Load a checkpoint into a model that is compiled already: each rank reads what it holds."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slope_fx.checkpoints.manifest import Manifest, check_files, check_hashes
from slope_fx.checkpoints.tensors import TensorReader
from slope_fx.checkpoints.together import Together
from slope_fx.checkpoints.unstored import make_unstored_buffers
from slope_fx.errors import CheckpointError
from slope_fx.planning.masks import packed_masks_problem
from slope_fx.planning.plan import sparse_plans
from slope_fx.record import record_of, sparse_weights
from slope_fx.sparse.mask import Mask
from slope_fx.sparse.weight import SparseWeight


def fill_model(
    model: nn.Module, folder: Path, manifest: Manifest, device: torch.device, *, verify: bool
) -> list[tuple[Tensor, Tensor]]:
    """Load the tensors of a checkpoint into a compiled model, in place.

    A rank reads only its part of a sharded tensor. Parameters on the meta device get memory. With
    sharded parameters this is a collective operation, in which the ranks share the check of the
    hashes.

    Args:
        model: the model, changed in place. Modules that were deleted from it are left out.
        folder: folder of the checkpoint.
        manifest: its manifest.
        device: device of tensors that are on the meta device, but for those of a mesh.
        verify: whether to check the hashes of the files.

    Returns:
        The parameters that were on the meta device, each with its replacement.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model. The model is then
            unchanged.
    """
    tensors = model.state_dict(keep_vars=True)
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    together = Together()
    with TensorReader(folder, manifest.tensors) as reader:
        with together.agreed() if sharded and together.world > 1 else nullcontext():
            try:
                files = sorted(manifest.files)
                check_files(folder, manifest, hashes=False)
                if verify:
                    share = files[together.rank :: together.world] if sharded else files
                    check_hashes(folder, manifest, share)
                check_same_layers(model, manifest)
                stored = _matched(model, folder, manifest, tensors, reader)
                for weight in sparse_weights(model).values():
                    _check_masks(weight, folder, tensors, stored, reader)
            except SafetensorError as error:
                raise CheckpointError(f"{folder} can't be read: {error}.") from None
        make_unstored_buffers(model, device)
        replaced = _write(model, tensors, stored, reader, device)
    for name in manifest.frozen:
        tensor = tensors.get(name)
        if tensor is not None and tensor.requires_grad:
            model.get_parameter(name).requires_grad_(False)
    active = any(entry.adapter_active for entry in manifest.sparse.values())
    for weight in sparse_weights(model).values():
        weight.phase.set(active)
        note_loaded(weight)
    return replaced


def note_loaded(weight: SparseWeight) -> None:
    """Note that all tensors of a weight were replaced by those of a checkpoint."""
    weight.start = None
    weight.first_fingerprint = 0  # of shards: all ranks read the same masks
    weight.note_write()
    weight.note_factor()


def check_same_layers(model: nn.Module, saved: Manifest) -> None:
    """Check that the sparse layers of a model are those of a checkpoint.

    Raises:
        CheckpointError: they are not.
    """
    theirs = {plan.name: plan for plan in sparse_plans(saved.plans)}
    mine = {plan.name: plan for plan in sparse_plans(record_of(model).plans)}
    weights = sparse_weights(model)
    for name in sorted({*theirs, *mine}):
        said = [
            "dense" if plan is None else f"{plan.pattern} of shape {plan.shape}"
            for plan in (theirs.get(name), mine.get(name))
        ]
        if name in saved.sparse and name in weights:
            ranks = saved.sparse[name].rank, weights[name].rank
            if ranks[0] != ranks[1]:
                said = [
                    f"{s}, with an adapter of rank {r}" for s, r in zip(said, ranks, strict=True)
                ]
        if said[0] != said[1]:
            raise CheckpointError(
                f"{name} is {said[0]} in the checkpoint and {said[1]} in the model. Compile the "
                "model as it was then."
            )


def _matched(
    model: nn.Module,
    folder: Path,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    reader: TensorReader,
) -> dict[str, str]:
    """The stored name of each tensor of the model, all checked."""
    stored: dict[str, str] = {}
    for name, tensor in tensors.items():
        found = manifest.aliases.get(name, name)
        if found not in manifest.tensors:
            raise CheckpointError(f"{folder} has no tensor {name}, which the model needs.")
        kind, shape = reader.describe(found), tuple(tensor.shape)
        same = kind.empty().is_floating_point() == tensor.is_floating_point()
        if kind.shape != shape or not same:
            raise CheckpointError(
                f"{folder}: {name} is {kind.dtype} {kind.shape}, where the model needs "
                f"{tensor.dtype} {shape}."
            )
        stored[name] = found
    for name in manifest.tensors:
        names = {name, *(alias for alias, n in manifest.aliases.items() if n == name)}
        if not names.intersection(tensors) and any(_has_owner(model, n) for n in names):
            raise CheckpointError(f"{folder} has {name}, for which the model has no place.")
    return stored


def _has_owner(model: nn.Module, name: str) -> bool:
    """Whether the module of a tensor exists: not so in a stage, which holds a part of a model."""
    try:
        owner = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return False
    return not isinstance(owner, nn.Identity)


def _check_masks(
    weight: SparseWeight,
    folder: Path,
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, str],
    reader: TensorReader,
) -> None:
    """Check this rank's rows of the masks of a weight."""
    name_of = {id(tensor): name for name, tensor in tensors.items()}
    parts = []
    for bits in (weight.forward_bits, weight.backward_bits):
        name = stored[name_of[id(bits)]]
        parts.append(
            reader.read_local(name, bits) if isinstance(bits, DTensor) else reader.read(name)
        )
    forward, backward = parts
    if forward.shape[1] != weight.forward_bits.shape[1] or not len(forward):
        return  # columns are sharded: the hash must do
    whole = len(forward) == len(weight.forward_bits)
    problem = packed_masks_problem(
        forward, backward if whole else None, weight.d_in, weight.pattern
    )
    if problem:
        raise CheckpointError(f"{folder}: {weight.name} should be {weight.pattern}, but {problem}.")


@torch.no_grad()
def _write(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, str],
    reader: TensorReader,
    device: torch.device,
) -> list[tuple[Tensor, Tensor]]:
    """Write the stored values into all tensors."""
    replaced: dict[int, tuple[Tensor, Tensor]] = {}
    done = set()
    for name, tensor in tensors.items():
        if id(tensor) in done:
            continue
        done.add(id(tensor))
        if isinstance(tensor, DTensor):
            part = reader.read_local(stored[name], tensor)
        else:
            part = reader.read(stored[name])
        if not tensor.is_meta:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local.copy_(part)
            continue
        replaced[id(tensor)] = tensor, _made(tensor, part, device)
    if replaced:
        for module in model.modules():
            for slots in (module._parameters, module._buffers):
                for slot, old in slots.items():
                    if id(old) in replaced:
                        slots[slot] = replaced[id(old)][1]  # type: ignore[assignment]
        # FSDP's modules take notice of new parameters in this method.
        model._apply(lambda tensor: tensor)
    return list(replaced.values())


def _made(old: Tensor, part: Tensor, device: torch.device) -> Tensor:
    """The tensor that replaces one on the meta device."""
    if isinstance(old, DTensor):
        local = part.to(old.device_mesh.device_type, old.dtype, copy=True)
        new: Tensor = DTensor.from_local(
            local, old.device_mesh, old.placements, run_check=False, shape=old.shape,
            stride=old.stride(),
        )  # fmt: skip
    else:
        new = part.to(device, old.dtype, copy=True)
    if isinstance(old, Mask):
        return Mask(new)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
