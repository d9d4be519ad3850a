"""``SparseWeight``: the masks and the adapter of one pruned weight."""

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slope_fx import ops
from slope_fx.errors import ArgumentError, StateError
from slope_fx.kernels.engines import forget_operands
from slope_fx.kernels.packing import unpack
from slope_fx.methods import Method, WeightState
from slope_fx.ops.dispatch import local
from slope_fx.ops.targets import ADD_ADAPTER
from slope_fx.ops.weights import expand_grad_observers
from slope_fx.planning.masks import packed_masks_problem
from slope_fx.planning.patterns import Pattern
from slope_fx.planning.plan import SparsePlan, values_name
from slope_fx.sparse.blank import (
    check_filled,
    content,
    emptied,
    fill,
    put,
    start_of,
    to_initialise,
)
from slope_fx.sparse.fallback import Fallback, tell_of_export
from slope_fx.sparse.mask import Mask, classes_kept, fingerprint_of
from slope_fx.sparse.parts import Parts, Shared
from slope_fx.sparse.pipelines import refuse_tracer
from slope_fx.sparse.reading import DenseWeight
from slope_fx.sparse.shards import put_mask, refresh_sharded, reshard_around, whole
from slope_fx.sparse.wrappers import (
    check_wrapper,
    ddp_that_asks,
    reduce_for,
    refuse_data_parallel,
)

# Finds the layer of a tensor in a compiled graph.
_alive: "weakref.WeakSet[SparseWeight]" = weakref.WeakSet()


class SparseWeight(nn.Module):
    """The submodule ``weight_sparse`` that ``compile`` adds to a layer with ``weight_values``.

    The values are a plain parameter of the layer. This module has the two masks, as frozen packed
    parameters, so that they are sharded, moved and saved with the values. It also has the adapter.

    Attributes:
        name: qualified name of the layer.
        n, m: the N:M pattern.
        d_out, d_in: size of the linear.
        stack: number of linears in the weight, such as the experts of a mixture; 1 for a plain
            linear. Values, masks and adapters are concatenated along the rows.
        layout: layout of the dense weight in the layer.
        forward_bits: uint8 (stack * d_out, ceil(d_in / 8)), one bit per element.
        backward_bits: uint8 (stack * d_out, ceil(d_in * N / M / 8)), one bit per value.
        factor: the number of the method, fp32 (), or None.
        lora_A, lora_B: (stack * r, d_in) and (stack * d_out, r), or None.
        scale: alpha / r, the factor of the adapter's product.
        method, phase, choices: as in :class:`Shared`.
        fallback: reports that the layer runs with its dense weight rebuilt.
        holders: the modules that have the values, each with their name there. The first owns them.
        start: the state of a weight without content; None for all other weights.
        probe: zeros (stack * d_out, d_in * (M - N) / M) whose gradient is that of the pruned
            elements, in the steps for which a method asks for it.
        parts: the numbers of parts into which tensor parallelism splits d_out and d_in.
    """

    parts: tuple[int, int] = (1, 1)
    probe: Tensor | None = None
    forward_bits: nn.Parameter
    backward_bits: nn.Parameter
    lora_A: nn.Parameter | None  # noqa: N815
    lora_B: nn.Parameter | None  # noqa: N815

    def __init__(
        self,
        plan: SparsePlan,
        owner: nn.Module,
        attribute: str,
        parts: Parts,
        shared: Shared,
        fallback: Fallback,
    ) -> None:
        super().__init__()
        self.name, self.layout = plan.name, plan.layout
        self.n, self.m = plan.pattern.n, plan.pattern.m
        self.stack, self.d_out, self.d_in = plan.layout.stack, plan.layout.d_out, plan.layout.d_in
        self.method, self.phase, self.choices = shared.method, shared.phase, shared.choices
        self.fallback, self.start = fallback, parts.start
        # In a tuple, so that the layer does not become a submodule of this module.
        self._owner = (owner,)
        self._values_name = values_name(attribute)
        self.holders: tuple[tuple[nn.Module, str], ...] = ((owner, self._values_name),)
        self.forward_bits = Mask(parts.forward_bits)
        self.first_fingerprint = fingerprint_of(parts.forward_bits)
        self.factor: Tensor | None
        self.register_buffer("factor", parts.factor)
        backward_bits = parts.backward_bits
        if backward_bits is None:
            backward_bits = self.chosen_backward_mask(parts.kept, parts.forward_bits)
        self.backward_bits = Mask(backward_bits)
        adapter = parts.adapter
        self.lora_A = None if adapter is None else nn.Parameter(adapter.lora_A)
        self.lora_B = None if adapter is None else nn.Parameter(adapter.lora_B)
        self.scale = 0.0 if adapter is None else adapter.scale
        self.phase.active |= adapter is not None and adapter.active
        self.note_factor()
        _alive.add(self)

    @property
    def pattern(self) -> Pattern:
        """The N:M pattern."""
        return Pattern(self.n, self.m)

    @property
    def values(self) -> nn.Parameter:
        """The trained parameter: the kept values (stack * d_out, d_in * N / M).

        With a method that stores dense weights: all elements, (stack * d_out, d_in).
        """
        # During torch.func.functional_call this is a plain tensor.
        return self._owner[0]._parameters[self._values_name]  # type: ignore[return-value]

    @property
    def installed(self) -> bool:
        """Whether the layer still has the values of this weight."""
        # A copy in the making has an owner without parameters yet.
        parameters = self._owner[0].__dict__.get("_parameters") or {}
        return parameters.get(self._values_name) is not None

    @property
    def rank(self) -> int | None:
        """The rank of the adapter, or None without one."""
        return None if self.lora_B is None else self.lora_B.shape[1]

    @property
    def adapter_active(self) -> bool:
        """Whether the weight has an adapter and the adapter is active."""
        return self.phase.active and self.lora_B is not None

    @property
    def expanded_because(self) -> str | None:
        """The reason why the layer trained with its dense weight rebuilt, or None."""
        return self.fallback.because

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_out, d_in), or (stack, d_out, d_in)."""
        return (self.d_out, self.d_in) if self.stack == 1 else (self.stack, self.d_out, self.d_in)

    def forward_mask(self) -> Tensor:
        """The forward mask, of the elements of ``W^R``: bool, in the shape :attr:`shape`."""
        check_filled(self)
        return unpack(whole(self.forward_bits), self.d_in).view(self.shape)

    def backward_mask(self) -> Tensor:
        """The backward mask, of the elements of ``W^{R,C}``: bool, in the shape :attr:`shape`.

        It is a subset of the forward mask.
        """
        check_filled(self)
        forward, backward = whole(self.forward_bits), whole(self.backward_bits)
        bits = unpack(backward, self.d_in * self.n // self.m).to(torch.uint8)
        both = ops.expand(bits, forward, backward, self.n, self.m)
        return both.bool().view(self.shape)

    def masks_problem(self) -> str:
        """The reason why the masks are not N:M, or "". Only a write to a mask can cause this."""
        forward, backward = whole(self.forward_bits), whole(self.backward_bits)
        return packed_masks_problem(forward, backward, self.d_in, self.pattern)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """A copy of ``W^R`` in the shape :attr:`shape`, without the adapter and autograd."""
        check_filled(self)
        return content(self, self.values).view(self.shape)

    @torch.no_grad()
    def refresh_backward_mask(self) -> None:
        """Choose the backward mask from the current values."""
        check_filled(self)
        reshard_around(self._owner[0])
        values, forward, backward = self.values, self.forward_bits, self.backward_bits
        if isinstance(values, DTensor):
            refresh_sharded(
                values, forward, backward, self.n, self.m, self.chosen_backward_mask,
                compressed=self.method.compressed,
            )  # fmt: skip
        else:
            backward.copy_(self.chosen_backward_mask(values, forward))

    @torch.no_grad()
    def choose_forward_mask(self) -> None:
        """Choose the forward mask from the magnitudes of a stored dense weight."""

        def chosen(kept: Tensor) -> Tensor:
            return ops.magnitude_mask(kept, self.n, self.m)

        put_mask(self.forward_bits, self.values, chosen)

    def read_from(self, forward_bits: Tensor, backward_bits: Tensor) -> WeightState:
        """What the method reads the weight from, with these masks."""
        state = self.factor, self.phase.fading, self.probe
        return WeightState(forward_bits, backward_bits, self.pattern, *state)

    def note_factor(self) -> None:
        """Note whether the pruned part takes part, after a change of the factor."""
        if self.method.fades:
            self.phase.fading = self.factor is None or self.factor.is_meta or bool(self.factor > 0)

    def become(self, method: Method, values: nn.Parameter) -> None:
        """Go on with another method, with its parameter, and without a factor."""
        self.method, self.factor, self.phase.fading = method, None, False
        self.fallback.costs = method.when_expanded
        for module, name in self.holders:
            module._parameters[name] = values
        self.refresh_backward_mask()

    def kept_values(self) -> Tensor:
        """The values (stack * d_out, d_in * N / M) of the pruned weight, without autograd.

        Raises:
            StateError: the pruned part still takes part.
        """
        self.check_faded()
        kept, forward = self.values.detach(), self.forward_bits.detach().as_subclass(Tensor)
        return self.method.values(kept, forward, self.factor, self.pattern)

    def check_faded(self) -> None:
        """Check that the pruned part takes no part.

        Raises:
            StateError: it does.
        """
        if self.phase.fading:
            raise StateError(
                f"{self.name}: its pruned part still takes part, with factor "
                f"{0.0 if self.factor is None else float(self.factor):g}. Train to the end of the "
                f'fading of method="{self.method.name}" first.'
            )

    def chosen_backward_mask(self, kept: Tensor, forward_bits: Tensor) -> Tensor:
        """The packed backward mask of plain tensors as in :class:`Parts`."""
        values = self.method.values(kept.detach(), forward_bits, self.factor, self.pattern)
        return ops.backward_mask(values, forward_bits, self.n, self.m)

    def read(self, kept: Tensor) -> Tensor:
        """Returns the layer's ``weight``. In a compiled graph, the passes find its markers."""
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                if not torch.compiler.is_dynamo_compiling():
                    refuse_tracer(self.name)
                tell_of_export()
            return self.layout.to_parameter(self._markers(kept))
        if torch.is_grad_enabled():
            check_wrapper(self.name, kept)
            self.fallback.note(
                "its weight was read outside of a compiled graph",
                trains=self.values.requires_grad,
            )
        if torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:
            # Dynamo skipped this frame. The next frame may be compiled, which does not support a
            # DenseWeight. An inference tensor refuses writes.
            check_filled(self)
            with torch.inference_mode(not torch.is_grad_enabled()):
                return self.layout.to_parameter(self._markers(kept))
        with torch.inference_mode(False):  # inference tensors have no version counter
            if start_of(self) is not None and not self.adapter_active:
                parameter = to_initialise(self, kept)
                return DenseWeight.of(self, parameter, parameter, self.layout)
            dense = self._markers(kept)
            return DenseWeight.of(self, dense, self.layout.to_parameter(dense))

    def _expanded(self, kept: Tensor) -> Tensor:
        return self.method.weight(kept, self.read_from(self.forward_bits, self.backward_bits))

    def _markers(self, kept: Tensor) -> Tensor:
        weight = self._expanded(kept)
        if self.adapter_active:
            weight = ADD_ADAPTER(weight, self.lora_A, self.lora_B, self.scale)
        return weight

    def write_(self, dense: Tensor) -> "SparseWeight":
        """Write the elements of a dense weight that the forward mask keeps to the values.

        The pruned elements are dropped. The forward mask and the adapter do not change. The
        backward mask is chosen from the new values. A method with a dense weight keeps all
        elements, and chooses both masks. A weight that was compiled on the meta device
        and did not train yet gets new masks, as from ``compile``.

        Call this on all ranks if the weight is sharded. Rank 0's tensor is written.

        Args:
            dense: (d_out, d_in), or (stack, d_out, d_in), as from :meth:`to_dense`. Any floating
                dtype and device.

        Returns:
            This weight.

        Raises:
            ArgumentError: ``dense`` has another shape or no floating dtype.
        """
        good = isinstance(dense, Tensor) and dense.is_floating_point()
        if not good or tuple(dense.shape) != self.shape:
            got = f"{tuple(dense.shape)} {dense.dtype}" if isinstance(dense, Tensor) else dense
            raise ArgumentError(
                f"{self.name}: write_ was given {got}; it takes a floating-point tensor of shape "
                f"{self.shape}, as from to_dense()."
            )
        self.store(dense.reshape(-1, self.d_in))
        return self

    @torch.no_grad()
    def store(self, matrix: Tensor) -> None:
        """Write the kept elements of a dense matrix (stack * d_out, d_in), as :meth:`write_`."""
        reshard_around(self._owner[0])
        values = self.values
        if values.is_meta:
            return
        matrix = whole(matrix.detach()).to(values.device, values.dtype)
        if start_of(self) is not None:
            fill(self, matrix)
            self.note_write()
            return
        put(values, self.method.keep(matrix, whole(self.forward_bits), self.pattern))
        self.note_write()
        if not self.method.compressed:
            self.choose_forward_mask()
        self.refresh_backward_mask()

    def note_write(self) -> None:
        """Note a write to the values that does not change their version counter.

        An engine may keep an operand that it made from a weight until the weight changes. It
        detects a change by the version of the parameter, or by an optimizer step. Call this method
        after other writes: writes to ``.data``, collectives of ``torch.distributed`` into a
        parameter, and writes by kernels and libraries through its address. It is needed with
        ``SLOPE_FX_KEEP_OPERANDS=1``, or between two micro-batches of one optimizer step. A call is
        never harmful.
        """
        forget_operands(local(self.values))

    @torch.no_grad()
    def expanded(self) -> Tensor:
        """The current content of ``weight``, (stack * d_out, d_in), without autograd."""
        if isinstance(self.values, DTensor) and not self.adapter_active:
            return content(self, self.values)
        return self._markers(self.values)

    @torch.no_grad()
    def has_pruned(self, matrix: Tensor) -> bool:
        """Whether a dense (stack * d_out, d_in) matrix has an element that the mask prunes."""
        pruned = ~unpack(whole(self.forward_bits), self.d_in)
        return bool((whole(matrix.detach()) * pruned != 0).any())

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As in nn.Module. A DistributedDataParallel does not get the adapter to manage."""
        named = super().named_parameters(prefix, recurse, remove_duplicate)
        wrapper = ddp_that_asks()
        if wrapper is None:
            return named
        factors = [factor for factor in (self.lora_A, self.lora_B) if factor is not None]
        reduce_for(wrapper, self, factors)
        return ((name, p) for name, p in named if not any(p is factor for factor in factors))

    def share(self) -> None:
        """Let all modules that share the weight have the values of its owner."""
        for module, name in self.holders:
            module._parameters[name] = self.values

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_data_parallel()

    def extra_repr(self) -> str:
        adapter = f", rank={self.rank}" if self.rank else ""
        stack = f", stack={self.stack}" if self.stack > 1 else ""
        return f"{self.pattern}, d_in={self.d_in}, d_out={self.d_out}{stack}{adapter}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseWeight":
        # The model moves to another device or dtype, so kept operands are no longer valid.
        self.note_write()
        was_meta = self.forward_bits.is_meta
        with classes_kept(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        empties = getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        if empties or was_meta != self.forward_bits.is_meta:
            emptied(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _alive.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseWeight":
        made = SparseWeight.__new__(SparseWeight)
        memo[id(self)] = made
        memo[id(self.method)] = self.method
        made.__setstate__(copy.deepcopy(self.__dict__, memo))
        return made

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
        # A mask of another pattern can have the right shape, such as 2:4 and 4:8. The engines
        # require exactly N elements per group, so other masks are refused.
        problem = self._stored_mask_problem(
            state_dict.get(f"{prefix}forward_bits"), state_dict.get(f"{prefix}backward_bits")
        )
        if problem:
            error_msgs.append(f"{prefix}{problem}; the layer is {self.pattern}.")
            return
        with classes_kept(self):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                error_msgs,
            )  # fmt: skip
        loaded = all(f"{prefix}{name}" in state_dict for name in ("forward_bits", "backward_bits"))
        if loaded and not self.forward_bits.is_meta:
            self.start = None
        self.note_factor()
        if self.lora_B is not None and f"{prefix}lora_B" in state_dict and whole(self.lora_B).any():
            # An adapter with B = 0 adds nothing, so B shows whether the adapter was active. Only
            # a Schedule deactivates adapters.
            self.phase.active = True

    def _stored_mask_problem(self, forward: object, backward: object) -> str:
        """The problem of the masks in a state dict, or "". torch reports missing masks."""
        if not isinstance(forward, Tensor) or forward.shape != self.forward_bits.shape:
            return ""
        if not isinstance(backward, Tensor) or backward.shape != self.backward_bits.shape:
            backward = None
        else:
            backward = whole(backward.detach()).to(torch.uint8)
        forward = whole(forward.detach()).to(torch.uint8)
        return packed_masks_problem(forward, backward, self.d_in, self.pattern)


def _tell_of_expanded_gradient(forward_mask: Tensor) -> None:
    """Report a gradient of an expanded weight that was not found at compile time.

    An example is a model that the user compiled with ``torch.compile(model)``.
    """
    for weight in find_alive(lambda w: local(w.forward_bits).data_ptr() == forward_mask.data_ptr()):
        weight.fallback.gradient_arrived()


expand_grad_observers.append(_tell_of_expanded_gradient)


def find_alive(matches: Callable[[SparseWeight], bool]) -> list[SparseWeight]:
    """The sparse weights in this process that a layer still has and ``matches`` accepts.

    A weight that ``densify(inplace=True)`` removed, or whose layer lost its values, exists until
    it is collected.
    """
    return [weight for weight in list(_alive) if weight.installed and matches(weight)]
