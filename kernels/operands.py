"""The operands that engines make from weights and keep while the weights do not change.

An operand takes as much memory as the values of the weight. It is therefore kept only where a graph
that trains used it again between two steps of an optimizer, for example under gradient accumulation
or activation checkpointing. It is removed when the optimizer steps. At inference and evaluation no
operand is kept. ``SLOPE_FX_KEEP_OPERANDS`` overrides this: 1 keeps all operands, which is faster,
and 0 keeps none.

A kept operand is never used after its weight changed. A new operand is made when

- the values or a mask were written in place, replaced or moved. Their versions, which autograd
  counts for the same purpose, and their addresses show this;
- any optimizer began or ended a step. Many optimizers write without a change of the version,
  through ``.data`` or in fused kernels. During a step no operand is kept;
- the memory of the values was freed in between. FSDP does this with a gathered weight, and does
  not change its version. No operand is kept for such values from then on: it would keep gathered
  what FSDP shards. The same holds for weights that a CUDA graph steps, because its replays call no
  hook.

No operand is kept for values without a version (inference tensors), or while a CUDA graph is
captured or prepared: its replays would use the operand without a check.

Some writes are not detected: writes to ``.data`` or by address (collectives, other kernels) between
two micro-batches, or between any two uses if all operands are kept. Call :meth:`Operands.forget`
after such writes.
"""

import functools
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from slope_fx.kernels.errors import ArgumentError, EngineWarning

Operand = Tensor | tuple[Tensor, ...]
Made = TypeVar("Made", bound=Operand)


def policy() -> Literal["", "0", "1"]:
    """``SLOPE_FX_KEEP_OPERANDS``: "1" keeps all operands, "0" none, "" those that are used again.

    Raises:
        ArgumentError: the value is another one.
    """
    value = os.environ.get("SLOPE_FX_KEEP_OPERANDS", "").strip()
    if value not in ("", "0", "1"):
        raise ArgumentError(
            f"SLOPE_FX_KEEP_OPERANDS={value!r}; allowed are 1 (keep all operands: faster "
            "inference, more memory), 0 (keep none), or nothing (those used again between two "
            "optimizer steps)."
        )
    return cast(Literal["", "0", "1"], value)


class _Stamp:
    """The versions and addresses of a weight and its masks at some time."""

    def __init__(self, values: Tensor, masks: tuple[Tensor, ...]) -> None:
        self._values = (values.data_ptr(), values._version)
        self._of_masks = [(mask.data_ptr(), mask._version) for mask in masks]
        self._masks = [TensorWeakRef(mask) for mask in masks]

    def holds(self, values: Tensor, masks: tuple[Tensor, ...]) -> bool:
        """Whether the values and the masks are unchanged."""
        return (
            self.of_values(values)
            and self._of_masks == [(mask.data_ptr(), mask._version) for mask in masks]
            and all(ref() is mask for ref, mask in zip(self._masks, masks, strict=True))
        )

    def of_values(self, values: Tensor) -> bool:
        """Whether the values are unchanged. The masks may have changed."""
        return self._values == (values.data_ptr(), values._version)


@dataclass
class _Kept:
    operand: Operand
    stamp: _Stamp
    used_again: bool = False

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.operand if isinstance(self.operand, tuple) else (self.operand,)


@dataclass
class _Weight:
    """The operands of a weight and its history.

    Attributes:
        kept: the kept operands by purpose.
        seen: the stamp of the weight at the last use of an operand, by purpose.
        reused: purposes whose operands were used again between two steps.
        stepped: whether an optimizer stepped while the memory of the weight was allocated.
        passing: whether the memory is freed and allocated again, or written by a CUDA graph.
    """

    kept: dict[Hashable, _Kept] = field(default_factory=dict)
    seen: dict[Hashable, _Stamp] = field(default_factory=dict)
    reused: set[Hashable] = field(default_factory=set)
    stepped: bool = False
    passing: bool = False


class Operands:
    """The operands of one engine, for all weights."""

    def __init__(self) -> None:
        self._weights = WeakTensorKeyDictionary()
        self._used = WeakTensorKeyDictionary()  # the weights used since the last step
        self._young = WeakTensorKeyDictionary()  # weights with operands, without a step so far
        # Optimizers within a step. An optimizer that failed in its step leaves when it is deleted.
        self._steps: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._epoch = 0
        self._watching = False
        self._lock = threading.RLock()

    def get(
        self,
        values: Tensor,
        masks: tuple[Tensor, ...],
        purpose: tuple[Hashable, ...],
        make: Callable[[], Made],
        training: bool,
    ) -> Made:
        """The operand for a purpose: the kept operand if nothing changed, or a new operand.

        Args:
            values: (d_out, d_in * N / M).
            masks: the packed masks that the operand depends on.
            purpose: key of the operand among those of the same values.
            make: makes the operand.
            training: whether the caller is a graph that trains.
        """
        keep_all = policy() == "1"
        if not (training or keep_all) or policy() == "0" or replayed(values.device):
            return make()
        if any(tensor.is_inference() for tensor in (values, *masks)):
            if keep_all:
                _say_inference()
            return make()
        key = (*purpose, _stream(values.device))
        self._watch()
        if self._steps:
            return make()
        with self._lock:
            weight: _Weight = self._weights.setdefault(values, _Weight())
            self._used[values] = weight
            kept = weight.kept.get(key)
            if kept is not None and kept.stamp.holds(values, masks):
                kept.used_again = True
                return cast(Made, kept.operand)
            # Free the memory before new operands are made. Operands of other purposes go too if
            # they were made from other values.
            weight.kept.pop(key, None)
            kept = None
            if not all(other.stamp.of_values(values) for other in weight.kept.values()):
                weight.kept.clear()
            self._look_for_freed()
            if key in weight.seen and weight.seen[key].holds(values, masks):
                weight.reused.add(key)
            stamp = weight.seen[key] = _Stamp(values, masks)
            known = weight.stepped and key in weight.reused
            keep, epoch = not weight.passing and (known or keep_all), self._epoch
        operand = make()
        with self._lock:
            if keep and epoch == self._epoch:
                weight.kept[key] = _Kept(operand, stamp)
                if not weight.stepped:
                    self._young[values] = weight
        return operand

    def forget(self, values: Tensor | None = None) -> None:
        """Forget the operands and the history of ``values``, or of all weights."""
        with self._lock:
            self._epoch += 1
            for known in (self._weights, self._used, self._young):
                if values is None:
                    known.clear()
                else:
                    known.pop(values, None)

    def nbytes(self, values: Tensor | None = None) -> int:
        """The bytes of the operands that are kept for ``values``, or for all weights."""
        with self._lock:
            if values is None:
                return sum(map(self.nbytes, list(self._weights)))
            weight: _Weight = self._weights.get(values, _Weight())
            return sum(part.nbytes for kept in weight.kept.values() for part in kept.parts)

    def _watch(self) -> None:
        with self._lock:
            if self._watching:
                return
            self._watching = True
            register_optimizer_step_pre_hook(torch.compiler.disable(self._begins))
            register_optimizer_step_post_hook(torch.compiler.disable(self._ends))

    def _begins(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        with self._lock:
            self._steps.add(optimizer)
            self._drop()

    def _ends(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        with self._lock:
            self._steps.discard(optimizer)
            self._drop()

    def _drop(self) -> None:
        """Remove all operands, and remember which of them were used again."""
        self._epoch += 1
        if not self._used:
            return
        self._look_for_freed()
        captured = _capturing()
        for values, weight in list(self._used.items()):
            weight.passing |= captured or _freed(values)
            weight.stepped |= values.requires_grad and not weight.passing
            weight.reused -= {key for key, kept in weight.kept.items() if not kept.used_again}
            weight.kept.clear()
            weight.seen.clear()
        self._used.clear()
        self._young.clear()

    def _look_for_freed(self) -> None:
        for values, weight in list(self._young.items()):
            if _freed(values):
                weight.passing = True
                weight.kept.clear()


def _freed(values: Tensor) -> bool:
    return values.untyped_storage().nbytes() == 0


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def replayed(device: torch.device) -> bool:
    """Whether a CUDA graph is captured or warmed up now, by the user or by Inductor."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return True
    trees: Any = sys.modules.get("torch._inductor.cudagraph_trees")
    manager = trees and trees.get_manager(device.index, create_if_none_exists=False)
    return bool(manager and (manager.in_warmup or manager.in_recording))


def _stream(device: torch.device) -> int:
    # A part of the key, because another stream could use an operand before it is made.
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.cache
def _say_inference() -> None:
    warnings.warn(
        "SLOPE_FX_KEEP_OPERANDS=1 has no effect on weights that are inference tensors, because "
        "PyTorch does not record changes of them. Load the weights outside of "
        "torch.inference_mode().",
        EngineWarning,
        stacklevel=2,
    )
