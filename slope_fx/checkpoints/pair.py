"""A sparse model as a pair: a dense model with zeros, and an adapter of PEFT.

Beside the adapter are ``slope_fx.json`` and the masks. With these, the pair becomes the sparse
model again, bit for bit.
"""

import dataclasses
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slope_fx.attach import attach, make_record
from slope_fx.backend.settings import Settings
from slope_fx.checkpoints.layers import names_of
from slope_fx.checkpoints.loading import move_buffers
from slope_fx.checkpoints.manifest import (
    BESIDE_PEFT,
    Manifest,
    check_hashes,
    describe_files,
    read_manifest,
)
from slope_fx.checkpoints.saving import describe_model
from slope_fx.errors import CheckpointError
from slope_fx.kernels.packing import unpack
from slope_fx.methods import Slope, method_of
from slope_fx.planning.adapters import Adapter
from slope_fx.planning.masks import packed_masks_problem
from slope_fx.planning.plan import SparsePlan, sparse_plans
from slope_fx.record import sparse_weights
from slope_fx.sparse.install import install
from slope_fx.sparse.parts import Parts
from slope_fx.sparse.shards import whole

MASKS = "slope_fx_masks.safetensors"
_ADAPTER = "adapter_model.safetensors"


def describe_pair(model: nn.Module, folder: Path) -> None:
    """Write what a pair does not tell of the sparse model into the folder of the adapter.

    Args:
        model: the sparse model. If it is frozen, the model made of the pair can train.
        folder: the folder of the adapter.
    """
    described = dataclasses.replace(describe_model(model), inference=None)
    if not method_of(described.config.method).compressed:  # the pair is the compressed model
        config = dataclasses.replace(described.config, method=Slope())
        described = dataclasses.replace(described, config=config)
    weights, tensors = sparse_weights(model), {}
    for plan in sparse_plans(described.plans):
        _, beside = names_of(plan)
        for kind in ("forward_bits", "backward_bits"):
            mask = getattr(weights[plan.name], kind, None)  # a frozen weight has no backward mask
            if mask is not None:
                plain = whole(mask.detach()).as_subclass(Tensor)
                tensors[f"{beside}{kind}"] = plain.cpu().contiguous().clone()
    save_file(tensors, folder / MASKS, metadata={"format": "pt"})
    dataclasses.replace(
        described, tensors=dict.fromkeys(tensors, MASKS), files=describe_files(folder, [MASKS])
    ).write(folder, BESIDE_PEFT)


def sparse_of_pair(dense: nn.Module, folder: Path) -> nn.Module:
    """Make the sparse model of a pair, in place.

    Args:
        dense: the dense model.
        folder: the folder of the adapter.

    Raises:
        CheckpointError: a file is damaged, or the pair is not what was exported, but for the
            content of its kept elements and of its adapters.
    """
    manifest = read_manifest(folder, BESIDE_PEFT)
    check_hashes(folder, manifest, [MASKS])
    masks, factors = load_file(folder / MASKS), load_file(folder / _ADAPTER)
    method, settings = method_of(manifest.config.method), Settings.of(backend=None)
    plans = sparse_plans(manifest.plans)
    parameters = dict(dense.named_parameters())
    for plan in plans:
        parameter = parameters.get(plan.parameter_name)
        if parameter is None or tuple(parameter.shape) != plan.layout.shape:
            raise CheckpointError(
                f"{folder} is an adapter for a model with {plan.parameter_name} of shape "
                f"{plan.layout.shape}. {_NOT_THE_PAIR}"
            )

    def make_parts(plan: SparsePlan, weight: Tensor) -> Parts:
        matrix = plan.layout.to_matrix(weight).contiguous().view(-1, plan.layout.d_in)
        _, beside = names_of(plan)
        forward, backward = masks[f"{beside}forward_bits"], masks.get(f"{beside}backward_bits")
        problem = packed_masks_problem(forward, backward, plan.layout.d_in, plan.pattern)
        if not problem and matrix[~unpack(forward, plan.layout.d_in)].any():
            problem = "elements are not zero that were pruned"
        if problem:
            raise CheckpointError(f"{plan.name}: {problem}. {_NOT_THE_PAIR}")
        kept = method.keep(matrix, forward, plan.pattern)
        return Parts(kept, forward, backward, _adapter(plan, manifest, factors))

    record = make_record(
        dense, manifest.config, settings, manifest.plans, manifest.untraced_because,
        manifest.graphs,
    )  # fmt: skip
    with ExitStack() as undo:
        install(dense, plans, make_parts, method, settings.on_fallback, undo)
        attach(dense, record, undo)
        undo.pop_all()
    move_buffers(dense, manifest, torch.device("cpu"), None)
    for name in manifest.frozen:
        dense.get_parameter(name).requires_grad_(False)
    return dense


_NOT_THE_PAIR = (
    "The dense model and the adapter are not the pair that was exported. Remove slope_fx.json "
    "beside the adapter to prune the dense model again."
)


def _adapter(plan: SparsePlan, manifest: Manifest, factors: dict[str, Tensor]) -> Adapter | None:
    entry, layout = manifest.sparse[plan.name], plan.layout
    if entry.rank is None:
        return None
    path = plan.parameter_name.rpartition(".")[0]
    a, b = (factors.get(f"base_model.model.{path}.lora_{part}.weight") for part in "AB")
    shapes = (entry.rank, layout.d_in), (layout.d_out, entry.rank)
    if a is None or b is None or (tuple(a.shape), tuple(b.shape)) != shapes:
        raise CheckpointError(f"{plan.name}: its adapter is of rank {entry.rank}. {_NOT_THE_PAIR}")
    return Adapter(a, b, entry.scale, entry.adapter_active)
