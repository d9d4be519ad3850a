"""Weights without content: a model that was compiled on the meta device, or emptied.

Such a weight gets its content by the initialization of the model, as a dense weight does. Each
initialization of ``layer.weight`` chooses the masks from the complete dense matrix, keeps the
values and draws the adapter. This holds until the first optimizer step or Schedule, so an
initialization may write twice, as GPT-2's does. From then on, a write keeps the masks.

A sharded weight is initialized in the same way. The reading of ``weight`` is a temporary dense
matrix, whole on each rank. Rank 0 of the mesh decides: each rank receives its rows of rank 0's
matrix, so ranks with other random states can't keep rows of different matrices.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from slope_fx.errors import StateError
from slope_fx.planning.adapters import make_adapter
from slope_fx.planning.masks import choose_mask
from slope_fx.sparse.mask import fingerprint_of
from slope_fx.sparse.shards import found_anywhere

if TYPE_CHECKING:
    from slope_fx.sparse.weight import SparseWeight


@dataclass
class Start:
    """The state of a weight that has no content yet, or whose masks may still change.

    Attributes:
        mask: the mask method of the model's configuration. None: the weight had masks and lost
            them, so only a checkpoint can restore it.
        written: whether the weight has content.
        partial: the dense parameter while an initialization has written a part of it. Other
            elements are NaN.
        emptied: whether ``to_empty`` or a move took the content, so that of the model's buffers
            too.
    """

    mask: str | None
    written: bool = False
    partial: Tensor | None = None
    emptied: bool = False


class Started(Protocol):
    """The part of a sparse weight that tells whether it has content."""

    name: str
    start: Start | None

    @property
    def forward_bits(self) -> Tensor: ...


def fill(weight: "SparseWeight", matrix: Tensor, mask: object = None) -> None:
    """Choose masks, values and adapter from a dense matrix. A collective for a sharded weight.

    Args:
        weight: the weight.
        matrix: (stack * d_out, d_in), on the device and in the dtype of the values.
        mask: the ``mask`` argument of ``compile``. None: as remembered.

    Raises:
        StateError: the method isn't known.
    """
    start = weight.start
    if mask is None and start is not None:
        mask = start.mask
    if mask is None:
        raise StateError(
            f"{weight.name}: its masks were lost, by to_empty() or a move to the meta device, and "
            "can't be chosen again. Load a checkpoint, or make the model again: on the meta "
            "device, then slope_fx.compile, to_empty() and the initialization."
        )
    dense, pattern = matrix.view(weight.shape), weight.pattern
    chosen = choose_mask(mask, weight.name, dense, pattern)  # type: ignore[arg-type]
    if chosen.weight is not None:
        matrix = chosen.weight.reshape(matrix.shape)
    kept = weight.method.keep(matrix, chosen.bits, pattern)
    put(weight.values, kept)
    if weight.factor is not None:
        factor = weight.method.factor(matrix, chosen.bits, pattern)
        assert factor is not None
        if isinstance(weight.values, DTensor):  # that of rank 0's matrix, as the values
            mesh = weight.values.device_mesh
            factor = distribute_tensor(factor, mesh, [Replicate()] * mesh.ndim).to_local()
        weight.factor.copy_(factor)
    put(weight.forward_bits, chosen.bits)
    put(weight.backward_bits, weight.chosen_backward_mask(kept, chosen.bits))
    weight.note_factor()
    # Shards are rows of one matrix, whatever this rank chose.
    sharded = isinstance(weight.forward_bits, DTensor)
    weight.first_fingerprint = 0 if sharded else fingerprint_of(chosen.bits)
    if weight.rank is not None and weight.lora_A is not None and weight.lora_B is not None:
        made = make_adapter("zero", weight.name, dense, None, weight.rank, None)
        put(weight.lora_A, made.lora_A)
        put(weight.lora_B, made.lora_B)
    if start is not None:
        start.written, start.partial = True, None


def put(parameter: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor to a parameter. If it is sharded, rank 0's tensor is scattered."""
    if isinstance(parameter, DTensor):
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    parameter.copy_(tensor)


@torch.no_grad()
def start_of(weight: Started) -> Start | None:
    """The state of a weight. None if it was filled by other code than an initialization."""
    start = weight.start
    if start is None or start.written or weight.forward_bits.is_meta:
        return start
    bits = weight.forward_bits.detach()
    # A rank without rows can't tell, so it asks the others.
    if found_anywhere(bits) if isinstance(bits, DTensor) else bits.any():
        # A mask of zeros has no meaning, and emptied() made it zero. So other code has filled the
        # tensors in place, such as a broadcast from rank 0, or torch.distributed.checkpoint.load.
        weight.start = None
    return weight.start


def check_filled(weight: Started) -> None:
    """Check that a weight has content.

    Raises:
        StateError: it has none.
    """
    start, bits = start_of(weight), weight.forward_bits
    if start is None or start.written:
        return
    what = "is on the meta device" if bits.is_meta else "is not initialized"
    if start.partial is not None:
        what = "is initialized in part, and elements of it are NaN"
    advice = "Load a checkpoint."
    if start.mask is not None:
        advice = (
            "Give the model storage with model.to_empty(device=...), then run its own "
            "initialization, such as model.init_weights() or module.reset_parameters(); or load a "
            "checkpoint, of a dense model with slope_fx.checkpoints.load_dense(path, model); or "
            "write a dense weight with "
            f"slope_fx.sparse_weights(model)[{weight.name!r}].write_(dense)."
        )
    raise StateError(f"{weight.name}: its sparse weight {what}. {advice}")


def settle(weight: "SparseWeight") -> None:
    """Keep the masks from now on.

    Raises:
        StateError: the weight has no content.
    """
    check_filled(weight)
    weight.start = None


@torch.no_grad()
def emptied(weight: "SparseWeight") -> None:
    """Note that the weight lost its content."""
    start = weight.start
    weight.start = Start(None if start is None else start.mask, emptied=True)
    weight.forward_bits.zero_()
    weight.backward_bits.zero_()


def to_initialise(weight: "SparseWeight", kept: Tensor) -> Tensor:
    """The dense weight for a reading, in the shape of the layer's parameter and contiguous.

    It is contiguous as the dense parameter, because the order of random numbers depends on that.
    Elements without content are NaN.
    """
    layout, start = weight.layout, weight.start
    if start is not None and start.written:
        return layout.to_parameter(content(weight, kept)).contiguous()
    if start is not None and start.partial is not None:
        return start.partial
    return torch.full(layout.shape, float("nan"), dtype=kept.dtype, device=kept.device)


def content(weight: "SparseWeight", kept: Tensor) -> Tensor:
    """The pruned weight as a plain tensor (stack * d_out, d_in), gathered if it is sharded."""
    tensors = (kept, weight.forward_bits, weight.backward_bits)
    kept, *masks = (t.full_tensor() if isinstance(t, DTensor) else t for t in tensors)
    return weight.method.weight(kept, weight.read_from(*masks))
