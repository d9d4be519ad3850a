"""What a method changes in a sparse weight around the steps of an optimizer."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from slope_fx import ops
from slope_fx.errors import UnsupportedError
from slope_fx.kernels.packing import unpack
from slope_fx.ops.dispatch import local
from slope_fx.sparse.shards import local_part, put_mask
from slope_fx.sparse.trained import states_of
from slope_fx.sparse.weight import SparseWeight
from slope_fx.sparse.wrappers import mean_over_ranks, wrapper_of


def check_whole(weight: SparseWeight, *, first_step: bool) -> None:
    """Check that several processes train a weight together, if its method needs it whole.

    Args:
        weight: the sparse weight.
        first_step: whether a step was taken, so that the model has its wrapper.

    Raises:
        UnsupportedError: it is sharded, or the processes do not train it in a
            DistributedDataParallel.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not (weight.method.whole and several):
        return
    what = ""
    if isinstance(weight.values, DTensor):
        what = "is sharded, and a mask moves by the gradient of the whole weight"
    elif first_step and wrapper_of(weight) is None:
        what = f"is in no wrapper: the masks of {dist.get_world_size()} ranks would move apart"
    if what:
        raise UnsupportedError(
            f'{weight.name} {what}. Train method="{weight.method.name}" on one process, or on '
            "several in torch.nn.parallel.DistributedDataParallel."
        )


@torch.no_grad()
def before_step(weight: SparseWeight, scale: Tensor | float) -> None:
    """Let the method change the gradient before an optimizer's step.

    Args:
        weight: the sparse weight.
        scale: a GradScaler's factor, which the gradient still has; else 1.
    """
    kept, gradient, bits = weight.values.detach(), weight.values.grad, weight.forward_bits
    if gradient is None or _changed.get(gradient) == local(gradient)._version:
        return
    mine = local_part(bits, kept) if isinstance(kept, DTensor) else bits
    weight.method.change_gradient(local(gradient), local(kept), mine, scale)
    _changed[gradient] = local(gradient)._version


_changed = WeakTensorKeyDictionary()
"""The versions of gradients that a method has changed. An optimizer in another one steps too."""


@torch.no_grad()
def after_step(weight: SparseWeight, step: int, total_steps: int) -> None:
    """Let the method choose the forward mask after a step, and choose the backward mask for it."""
    if weight.probe is not None:
        weight.probe.grad = mean_over_ranks(weight, weight.probe.grad, weight.probe)
    masks = weight.forward_bits.detach(), weight.backward_bits.detach()
    read = weight.read_from(*(local(mask).as_subclass(Tensor) for mask in masks))
    if not weight.method.moves(read):
        return

    def chosen(kept: Tensor) -> Tensor:
        bits = weight.method.next_mask(kept, read, step, total_steps)
        if weight.method.compressed:
            move_values(weight, bits)
        return bits

    put_mask(weight.forward_bits, weight.values, chosen)
    weight.refresh_backward_mask()


@torch.no_grad()
def prepare(weight: SparseWeight, step: int, total_steps: int) -> None:
    """Set what depends on the number of steps alone. It is called again after a resume."""
    factor = weight.method.factor_at(step, total_steps)
    if factor is not None and weight.factor is not None:
        weight.factor.fill_(factor)
        weight.phase.fading = factor > 0  # without a look at the tensor, which may be on a GPU
    weight.probe = None
    if weight.method.probes(step, total_steps):
        rows, pruned = weight.values.shape[0], weight.d_in * (weight.m - weight.n) // weight.m
        weight.probe = weight.values.new_zeros(rows, pruned).requires_grad_()


def move_values(weight: SparseWeight, forward_bits: Tensor) -> None:
    """Reorder compressed values for a new forward mask. New elements are zero.

    The states of the optimizer follow: those of new elements are zero. A state without negative
    numbers is one that an optimizer divides by, such as a mean of squared gradients. There, new
    elements get the mean of their group.

    Raises:
        UnsupportedError: a state is not stored as floating-point numbers.
    """
    states = states_of(weight.values)
    for name, state in states:
        if not state.is_floating_point():
            raise UnsupportedError(
                f'{weight.name}: the optimizer stores {name} as {state.dtype}. method="'
                f'{weight.method.name}" moves states to other elements, which it can do with '
                "floating-point ones: use an optimizer without quantised states."
            )

    old, n, m = weight.forward_bits.detach().clone(), weight.n, weight.m
    new = unpack(forward_bits, weight.d_in) & ~unpack(old, weight.d_in)

    def moved(tensor: Tensor, *, squares: bool = False) -> Tensor:
        dense = ops.expand(tensor, old, old, n, m)
        if squares:
            means = dense.unflatten(-1, (-1, m)).sum(-1) / n
            dense = torch.where(new, means.repeat_interleave(m, -1), dense)
        return ops.compress(dense, forward_bits, n, m)

    for _, state in states:
        state.copy_(moved(state, squares=bool((state >= 0).all())))
    weight.values.copy_(moved(weight.values.detach()))
    weight.note_write()
