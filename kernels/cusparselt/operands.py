"""What is made from a weight, and used again where that pays and the weight hasn't changed.

An operand takes as much memory as the weight's values do. So it is kept only where it was seen to
be used again between two steps of an optimizer, as under gradient accumulation and activation
checkpointing, and is gone while the optimizer steps. A weight that no optimizer steps, as at
inference, keeps none. ``SLOPE_FX_KEEP_OPERANDS`` says otherwise: 1 keeps all, for speed, 0 none.

A kept operand is never used after its weight changed. It is made anew when

- the values or a mask were written in place, replaced or moved (their versions, which autograd
  keeps for the same purpose, and their addresses);
- an optimizer took a step, even one that writes to memory without a version showing it: through
  ``.data``, or fused;
- the memory of the values was given back in between, as FSDP does with a gathered weight, whose
  version says nothing either. For such values nothing is kept any more, which would also gather
  what FSDP means to spread.

It isn't kept at all for values whose changes nobody sees (inference tensors), nor while a CUDA
graph is captured or prepared: a replay would use it without asking.

One write escapes: to ``.data``, by hand, between two uses without an optimizer step.
"""

import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from slope_fx.kernels.errors import EngineError, EngineWarning

_LOOK_EVERY = 32
"""After so many operands made, those of values without memory are looked for."""


def policy() -> Literal["", "0", "1"]:
    """What ``SLOPE_FX_KEEP_OPERANDS`` says: "1" keep all, "0" none, "" those that are used again.

    Raises:
        EngineError: it says something else.
    """
    value = os.environ.get("SLOPE_FX_KEEP_OPERANDS", "").strip()
    if value not in ("", "0", "1"):
        raise EngineError(
            f"SLOPE_FX_KEEP_OPERANDS={value!r}; allowed are 1 (keep all operands: faster "
            "inference, more memory), 0 (keep none), or nothing (those used again between two "
            "optimizer steps)."
        )
    return cast(Literal["", "0", "1"], value)


class _Stamp:
    """What a weight was like at some time."""

    def __init__(self, values: Tensor, masks: tuple[Tensor, ...]) -> None:
        self._values = (values.data_ptr(), values._version)
        self._versions = [mask._version for mask in masks]
        self._masks = [TensorWeakRef(mask) for mask in masks]

    def holds(self, values: Tensor, masks: tuple[Tensor, ...]) -> bool:
        """Whether it still is."""
        return (
            self._values == (values.data_ptr(), values._version)
            and self._versions == [mask._version for mask in masks]
            and all(ref() is mask for ref, mask in zip(self._masks, masks, strict=True))
        )


@dataclass
class _Kept:
    operand: Tensor
    stamp: _Stamp
    used_again: bool = False


@dataclass
class _Weight:
    """What is known of a weight.

    Attributes:
        kept: operands by purpose.
        seen: the weight as it was when an operand was last asked for, by purpose.
        reused: purposes for which operands were asked for again.
        stepped: whether an optimizer steps it.
        passing: whether its memory comes and goes.
    """

    kept: dict[Hashable, _Kept] = field(default_factory=dict)
    seen: dict[Hashable, _Stamp] = field(default_factory=dict)
    reused: set[Hashable] = field(default_factory=set)
    stepped: bool = False
    passing: bool = False


class Operands:
    """The operands of one engine."""

    def __init__(self) -> None:
        self._weights = WeakTensorKeyDictionary()
        self._made = 0
        self._watching = False
        self._lock = threading.RLock()

    def get(
        self,
        values: Tensor,
        masks: tuple[Tensor, ...],
        purpose: tuple[Hashable, ...],
        make: Callable[[], Tensor],
    ) -> Tensor:
        """The operand for a purpose: the kept one if nothing changed, else a new one.

        Args:
            values, masks: what it is made from.
            purpose: what it is for, of all that may be made from the same values.
            make: makes it.
        """
        if policy() == "0" or replayed(values.device):
            return make()
        if any(tensor.is_inference() for tensor in (values, *masks)):
            if policy() == "1":
                _say_inference()
            return make()
        key = (*purpose, _stream(values.device))
        with self._lock:
            self._watch()
            weight: _Weight = self._weights.setdefault(values, _Weight())
            kept = weight.kept.get(key)
            if kept is not None and kept.stamp.holds(values, masks):
                kept.used_again = True
                return kept.operand
            weight.kept.pop(key, None)  # before its successor takes memory too
            del kept
            if key in weight.seen and weight.seen[key].holds(values, masks):
                weight.reused.add(key)
            stamp = weight.seen[key] = _Stamp(values, masks)
            known = weight.stepped and key in weight.reused
            keep = not weight.passing and (known or policy() == "1")
        operand = make()
        if keep:
            with self._lock:
                weight.kept[key] = _Kept(operand, stamp)
                self._made += 1
                if self._made % _LOOK_EVERY == 0:
                    self._forget_freed()
        return operand

    def forget(self, values: Tensor | None = None) -> None:
        """Forget what is known and kept of ``values``, or of all."""
        with self._lock:
            if values is None:
                self._weights.clear()
            else:
                self._weights.pop(values, None)

    def nbytes(self, values: Tensor | None = None) -> int:
        """Bytes of what is kept for ``values``, or for all."""
        with self._lock:
            if values is None:
                return sum(map(self.nbytes, list(self._weights)))
            weight: _Weight = self._weights.get(values, _Weight())
            return sum(kept.operand.nbytes for kept in weight.kept.values())

    def _watch(self) -> None:
        if not self._watching:
            self._watching = True
            # Before it, so that its memory is free during the step; after it, for the closure
            # that some evaluate within.
            register_optimizer_step_pre_hook(self._stepped)
            register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, *_: object) -> None:
        with self._lock:
            self._forget_freed()
            for values, weight in list(self._weights.items()):
                if values.requires_grad and not weight.passing:
                    weight.stepped = True
                    weight.reused -= {k for k, kept in weight.kept.items() if not kept.used_again}
                    weight.kept.clear()
                    weight.seen.clear()

    def _forget_freed(self) -> None:
        for values, weight in list(self._weights.items()):
            if values.untyped_storage().nbytes() == 0:
                weight.passing = True
                weight.kept.clear()


def replayed(device: torch.device) -> bool:
    """Whether a CUDA graph is captured now, or run once before that, by us or by Inductor."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return True
    trees: Any = sys.modules.get("torch._inductor.cudagraph_trees")
    manager = trees and trees.get_manager(device.index, create_if_none_exists=False)
    return bool(manager and (manager.in_warmup or manager.in_recording))


def _stream(device: torch.device) -> int:
    # Part of the key: on another stream an operand might be used before it is made.
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.cache
def _say_inference() -> None:
    warnings.warn(
        "SLOPE_FX_KEEP_OPERANDS=1 has no effect on weights that are inference tensors, whose "
        "changes can't be seen. Load them outside of torch.inference_mode().",
        EngineWarning,
        stacklevel=2,
    )
