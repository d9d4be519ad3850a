"""``SparseWeight``: the masks and the adapter of one compressed weight."""

import copy
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from slope_fx import ops
from slope_fx.errors import (
    ExpandedWeightError,
    ExpandedWeightWarning,
    WeightWriteError,
)
from slope_fx.kernels.engines import forget_operands
from slope_fx.kernels.packing import unpack
from slope_fx.masks import Mask
from slope_fx.ops.targets import ADD_ADAPTER, EXPAND
from slope_fx.ops.weights import expand_grad_observers
from slope_fx.passes.views import Layout
from slope_fx.patterns import Pattern
from slope_fx.reading import DenseWeight

OnFallback = Literal["warn", "error", "ignore"]

# To tell, from a tensor met in a compiled graph, which layer it belongs to.
_alive: "weakref.WeakSet[SparseWeight]" = weakref.WeakSet()


@dataclass(frozen=True)
class Parts:
    """The tensors that a layer's dense weight is replaced by.

    Attributes:
        values: (stack * d_out, d_in * N / M), any floating dtype.
        forward_bits: uint8 (stack * d_out, ceil(d_in / 8)).
        backward_bits: uint8 (stack * d_out, ceil(d_in * N / M / 8)); None to choose it from the
            values.
        lora_A, lora_B: (stack * r, d_in) and (stack * d_out, r), or None for no adapter.
        scale: what the adapter's product is multiplied by, alpha / r.
        adapter_active: whether the adapter takes part from the start.
    """

    values: Tensor
    forward_bits: Tensor
    backward_bits: Tensor | None = None
    lora_A: Tensor | None = None  # noqa: N815
    lora_B: Tensor | None = None  # noqa: N815
    scale: float = 0.0
    adapter_active: bool = False


class SparseWeight(nn.Module):
    """What ``compile`` puts beside a layer's ``weight_values``.

    The values stay on the layer, as a plain parameter; this module holds the two
    masks as frozen bit-packed parameters (so that they are sharded, moved and saved
    like the values) and, if asked for, the adapter.

    Attributes:
        name: the layer's qualified name.
        n, m: the pattern.
        d_out, d_in: the size of the linear.
        stack: how many such linears it holds, as the experts of a mixture; 1 for a plain one.
            Values, masks and adapters of each lie one below the other.
        layout: how the layer's own ``weight`` holds them.
        forward_bits: uint8 (stack * d_out, ceil(d_in / 8)), one bit per element.
        backward_bits: uint8 (stack * d_out, ceil(d_in * N / M / 8)), one bit per value.
        lora_A, lora_B: (stack * r, d_in) and (stack * d_out, r), or None.
        adapter_active: whether the adapter takes part. Dynamo guards on it, so that a
            change recompiles; the :class:`~slope_fx.Schedule` sets it.
        copies: deep copies that were made of it, as for an average of the model's weights.
        told_of_schedule: whether it was said that it has none.
        follows: whether a copy begins its adapter when its original does: until it has a
            Schedule of its own.
    """

    forward_bits: nn.Parameter
    backward_bits: nn.Parameter
    lora_A: nn.Parameter | None  # noqa: N815
    lora_B: nn.Parameter | None  # noqa: N815

    def __init__(
        self,
        name: str,
        pattern: Pattern,
        owner: nn.Module,
        attribute: str,
        parts: Parts,
        *,
        layout: Layout,
        on_fallback: OnFallback,
    ) -> None:
        super().__init__()
        self.name = name
        self.n, self.m = pattern.n, pattern.m
        self.stack, self.d_out, self.d_in = layout.stack, layout.d_out, layout.d_in
        self.layout = layout
        self.on_fallback = on_fallback
        self.expanded_because: str | None = None
        self._expanded_hint: str | None = None
        self.adapter_active = parts.adapter_active
        self.follows = True
        self.told_of_schedule = False
        self.copies: weakref.WeakSet[SparseWeight] = weakref.WeakSet()
        # In a tuple, so that the layer doesn't become a submodule of its own submodule.
        self._owner = (owner,)
        self._values_name = values_name(attribute)
        backward_bits = parts.backward_bits
        if backward_bits is None:
            backward_bits = ops.backward_mask(parts.values, parts.forward_bits, self.n, self.m)
        self.forward_bits = Mask(parts.forward_bits)
        self.backward_bits = Mask(backward_bits)
        self.lora_A = None if parts.lora_A is None else nn.Parameter(parts.lora_A)
        self.lora_B = None if parts.lora_B is None else nn.Parameter(parts.lora_B)
        self.scale = parts.scale
        _alive.add(self)

    @property
    def pattern(self) -> Pattern:
        """The N:M pattern."""
        return Pattern(self.n, self.m)

    @property
    def values(self) -> nn.Parameter:
        """The kept values (d_out, d_in * N / M): the parameter that trains."""
        values = self._owner[0]._parameters[self._values_name]
        assert values is not None
        return values  # torch.func.functional_call puts a plain tensor there

    @property
    def installed(self) -> bool:
        """Whether its layer still has the values that it belongs to."""
        return self._owner[0]._parameters.get(self._values_name) is not None

    @property
    def rank(self) -> int | None:
        """The adapter's rank, or None without one."""
        return None if self.lora_B is None else self.lora_B.shape[1]

    def forward_mask(self) -> Tensor:
        """bool (d_out, d_in), or (stack, d_out, d_in): the elements of ``W^R``."""
        return self._shaped(unpack(self.forward_bits, self.d_in))

    def backward_mask(self) -> Tensor:
        """The elements of ``W^{R,C}``, shaped like the forward mask's, of which it is a subset."""
        bits = unpack(self.backward_bits, self.d_in * self.n // self.m).to(torch.uint8)
        both = ops.expand(bits, self.forward_bits, self.backward_bits, self.n, self.m)
        return self._shaped(both.bool())

    def masks_problem(self) -> str:
        """What keeps its masks from being N:M, which nothing but a write to them can, or ""."""
        forward, backward = whole(self.forward_bits), whole(self.backward_bits)
        return packed_masks_problem(forward, backward, self.d_in, self.pattern)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """A copy of ``W^R``, shaped like the masks, without the adapter and without gradients."""
        masks = self.forward_bits, self.backward_bits
        return self._shaped(ops.expand(self.values, *masks, self.n, self.m))

    def _shaped(self, matrix: Tensor) -> Tensor:
        return matrix if self.stack == 1 else matrix.view(self.stack, self.d_out, self.d_in)

    @torch.no_grad()
    def refresh_backward_mask(self) -> None:
        """Choose the backward mask anew, from the current values."""
        values, forward_bits = whole(self.values), whole(self.forward_bits)
        bits = ops.backward_mask(values, forward_bits, self.n, self.m)
        if isinstance(self.backward_bits, DTensor):
            mesh, placements = self.backward_bits.device_mesh, self.backward_bits.placements
            bits = distribute_tensor(bits, mesh, placements)
        self.backward_bits.copy_(bits)

    def read(self, values: Tensor) -> Tensor:
        """What the layer's ``weight`` reads as: the markers that the passes look for."""
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                self._tell_of_export()
            return self.layout.to_parameter(self._markers(values))
        if torch.is_grad_enabled():
            self.note_expanded("its weight was read outside of a compiled graph")
        if torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:
            # In a frame that Dynamo gave up; the next may be compiled, and takes no subclass. An
            # inference tensor refuses to be written to.
            with torch.inference_mode(not torch.is_grad_enabled()):
                return self.layout.to_parameter(self._markers(values))
        with torch.inference_mode(False):  # whose tensors don't count what is written to them
            dense = self._markers(values)
            return DenseWeight.of(self, dense, self.layout.to_parameter(dense))

    def _tell_of_export(self) -> None:
        warnings.warn(
            "torch.export of a model with sparse weights: the program rebuilds each dense weight "
            "at every call, and needs slope_fx to be loaded. For a plain one export a dense copy: "
            "slope_fx.densify(model).",
            ExpandedWeightWarning,
            stacklevel=2,
        )

    def _markers(self, values: Tensor) -> Tensor:
        weight: Tensor = EXPAND(values, self.forward_bits, self.backward_bits, self.n, self.m)
        if self.adapter_active:
            weight = ADD_ADAPTER(weight, self.lora_A, self.lora_B, self.scale)
        return weight

    def write_(self, dense: Tensor) -> "SparseWeight":
        """Write a dense weight: its elements where the forward mask keeps them, in place.

        What the mask prunes is dropped. The forward mask and the adapter stay; the backward mask
        is chosen from the new values.

        Args:
            dense: (d_out, d_in), or (stack, d_out, d_in), as :meth:`to_dense` gives it; any
                floating dtype and device.

        Returns:
            Itself.

        Raises:
            WeightWriteError: ``dense`` has another shape, or isn't of floating point.
        """
        shape = (self.d_out, self.d_in) if self.stack == 1 else (self.stack, self.d_out, self.d_in)
        good = isinstance(dense, Tensor) and dense.is_floating_point()
        if not good or tuple(dense.shape) != shape:
            got = f"{tuple(dense.shape)} {dense.dtype}" if isinstance(dense, Tensor) else dense
            raise WeightWriteError(
                f"{self.name}: write_ was given {got}; it takes a tensor of floating point of "
                f"shape {shape}, as to_dense() gives it."
            )
        self.store(dense.reshape(-1, self.d_in))
        return self

    @torch.no_grad()
    def store(self, matrix: Tensor) -> None:
        """Write the kept elements of a dense (stack * d_out, d_in) matrix, as :meth:`write_`."""
        values = self.values
        matrix = matrix.detach().to(values.device, values.dtype).contiguous()
        kept = ops.compress(matrix, whole(self.forward_bits), self.n, self.m)
        if isinstance(values, DTensor):
            kept = distribute_tensor(kept, values.device_mesh, values.placements)
        values.copy_(kept)
        forget_operands(values)
        self.refresh_backward_mask()

    @torch.no_grad()
    def expanded(self) -> Tensor:
        """What ``weight`` is made of now, (stack * d_out, d_in), without autograd."""
        return self._markers(self.values)

    @torch.no_grad()
    def has_pruned(self, matrix: Tensor) -> bool:
        """Whether a dense (stack * d_out, d_in) matrix has an element that the mask prunes."""
        pruned = ~unpack(self.forward_bits, self.d_in)
        return bool((matrix.detach() * pruned != 0).any())

    def note_expanded(self, reason: str) -> None:
        """Take note that the dense weight was rebuilt where gradients are on.

        Reading it is no harm by itself. That the layer trains so shows when a gradient
        arrives, and is reported then; a frozen layer gets none, but passes one on, so
        that is reported at once.
        """
        self._expanded_hint = reason
        if not self.values.requires_grad:
            self.report_expanded(reason)

    def report_expanded(self, reason: str) -> None:
        """Say, once, that this layer trains with its dense weight rebuilt.

        Raises:
            ExpandedWeightError: with ``on_fallback="error"``.
        """
        message = (
            f"{self.name}: {reason}, so it trains with its dense weight rebuilt: the loss is "
            "right, but the layer is slow and its input gradient is that of W^R, not of the "
            "double-pruned W^{R,C}. Call the object that slope_fx.compile returned, without "
            "another torch.compile around it (a trainer's torch_compile=True, dynamo_backend=), "
            "and see TORCH_LOGS=recompiles,graph_breaks for why Dynamo gave up, if it did."
        )
        if self.on_fallback == "error":
            raise ExpandedWeightError(message)
        if self.on_fallback == "warn" and self.expanded_because is None:
            warnings.warn(message, ExpandedWeightWarning, stacklevel=4)
        self.expanded_because = reason

    def extra_repr(self) -> str:
        adapter = f", rank={self.rank}" if self.rank else ""
        stack = f", stack={self.stack}" if self.stack > 1 else ""
        return f"{self.pattern}, d_in={self.d_in}, d_out={self.d_out}{stack}{adapter}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseWeight":
        # The model moves to another device or dtype: what engines made of it stays behind.
        forget_operands(self.values)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "copies"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "copies": weakref.WeakSet(), "follows": True})  # type: ignore[no-untyped-call]
        _alive.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseWeight":
        made = SparseWeight.__new__(SparseWeight)
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        self.copies.add(made)
        return made

    def begin_adapter(self) -> None:
        """Let the adapter take part from now on, and those of copies that follow."""
        self.adapter_active = self.rank is not None
        for copied in self.copies:
            if copied.follows:
                copied.begin_adapter()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A mask of another pattern can have the right shape (2:4 and 4:8 do); the
        # engines rely on exactly N a group, so nothing else may get in.
        problem = self._stored_mask_problem(
            state_dict.get(f"{prefix}forward_bits"), state_dict.get(f"{prefix}backward_bits")
        )
        if problem:
            error_msgs.append(f"{prefix}{problem}; the layer is {self.pattern}.")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.lora_B is not None and f"{prefix}lora_B" in state_dict:
            # While B is zero the adapter adds nothing, so a checkpoint needs no flag to
            # evaluate as it was saved. Only on, never off: that is the Schedule's to say.
            self.adapter_active |= bool(whole(self.lora_B).any())

    def _stored_mask_problem(self, forward: object, backward: object) -> str:
        """What is wrong with masks about to be loaded, or "". Missing ones are torch's to tell."""
        if not isinstance(forward, Tensor) or forward.shape != self.forward_bits.shape:
            return ""
        if not isinstance(backward, Tensor) or backward.shape != self.backward_bits.shape:
            backward = None
        else:
            backward = whole(backward.detach()).to(torch.uint8)
        forward = whole(forward.detach()).to(torch.uint8)
        return packed_masks_problem(forward, backward, self.d_in, self.pattern)


def _tell_of_expanded_gradient(forward_mask: Tensor) -> None:
    """The last resort: what reading the weight and the backend didn't notice, the ops do.

    That is a model compiled by another hand, ``torch.compile(model)`` say.
    """
    for weight in find_alive(lambda w: w.forward_bits.data_ptr() == forward_mask.data_ptr()):
        hint = weight._expanded_hint or (
            "it is in a graph that no pass rewrote (one compiled by another backend, or shared "
            "with a layer already named)"
        )
        if weight.expanded_because is None or weight.on_fallback == "error":
            weight.report_expanded(hint)


expand_grad_observers.append(_tell_of_expanded_gradient)


def values_name(attribute: str) -> str:
    """The name of the parameter that holds the values of ``attribute``."""
    return f"{attribute}_values"


def sparse_name(attribute: str) -> str:
    """The name of the submodule that holds the masks and the adapter of ``attribute``."""
    return f"{attribute}_sparse"


def find_alive(matches: Callable[[SparseWeight], bool]) -> list[SparseWeight]:
    """The living sparse weights that ``matches`` holds for, of those that a layer still has.

    One that ``densify(inplace=True)`` took away, or whose layer was stripped of its values, lives
    on until it is collected.
    """
    return [weight for weight in list(_alive) if weight.installed and matches(weight)]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which FSDP keeps a shard here; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mask_problem(mask: Tensor, pattern: Pattern) -> str:
    """What keeps a bool (d_out, d_in) mask from being N:M, or "" if nothing does."""
    kept = mask.view(mask.shape[0], -1, pattern.m).sum(-1)
    wrong = (kept != pattern.n).nonzero()
    if not len(wrong):
        return ""
    row, group = wrong[0].tolist()
    return (
        f"the mask keeps {int(kept[row, group])} elements in group {group} of row {row} "
        f"({len(wrong)} such groups), where exactly {pattern.n} of each {pattern.m} are allowed"
    )


def packed_masks_problem(
    forward: Tensor, backward: Tensor | None, d_in: int, pattern: Pattern
) -> str:
    """What keeps packed masks, shaped as in :class:`SparseWeight`, from being N:M, or ""."""
    problem = mask_problem(unpack(forward, d_in), pattern)
    if problem:
        return f"forward_bits: {problem}"
    if backward is None:
        return ""
    kept = unpack(backward, d_in * pattern.n // pattern.m)
    both = ops.expand(kept.to(torch.uint8), forward, forward, pattern.n, pattern.m)
    columns = both.t().reshape(d_in, -1, pattern.m).sum(-1)
    if (columns > pattern.n).any():
        return f"backward_bits: the mask keeps more than {pattern.n} of {pattern.m} outputs"
    return ""


__all__ = [
    "OnFallback",
    "Parts",
    "SparseWeight",
    "find_alive",
    "mask_problem",
    "packed_masks_problem",
    "sparse_name",
    "values_name",
]
