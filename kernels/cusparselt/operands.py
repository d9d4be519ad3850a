"""What is made from a weight once, and used until the weight changes.

A kept operand is never used after its weight changed. It is made anew when

- the values or a mask were written in place, replaced or moved (their versions, which autograd
  keeps for the same purpose, and their addresses);
- an optimizer took a step, even one that writes to ``.data``, which versions don't show;
- the memory of the values was given back in between, as FSDP does with a gathered weight, whose
  version then says nothing either. Nothing is kept for such values any more, which would also
  gather what FSDP means to spread.

It isn't kept at all for values whose changes nobody sees (inference tensors), nor while a CUDA
graph is captured or prepared: a replay would use it without asking.

One write escapes: to ``.data``, by hand, between two uses without an optimizer step.
"""

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from slope_fx.kernels.errors import EngineWarning

_LOOK_EVERY = 32
"""After so many operands made, those of values without memory are looked for."""


@dataclass(frozen=True)
class _Kept:
    operand: Tensor
    stamp: tuple[object, ...]
    masks: tuple[TensorWeakRef, ...]


class Operands:
    """The operands of one engine."""

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()
        self._passing = WeakTensorKeyDictionary()
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
        if not self._may_keep(values, masks):
            return make()
        key = (*purpose, _stream(values.device))
        stamp = (values.data_ptr(), values._version, *(mask._version for mask in masks))
        with self._lock:
            kept: _Kept | None = self._kept.get(values, {}).get(key)
            if kept is not None:
                same = all(ref() is mask for ref, mask in zip(kept.masks, masks, strict=True))
                if same and kept.stamp == stamp:
                    return kept.operand
                del kept, self._kept[values][key]  # before its successor takes memory too
            self._watch()
        operand = make()
        with self._lock:
            refs = tuple(TensorWeakRef(mask) for mask in masks)
            self._kept.setdefault(values, {})[key] = _Kept(operand, stamp, refs)
            self._made += 1
            if self._made % _LOOK_EVERY == 0:
                self._forget_freed()
        return operand

    def forget(self, values: Tensor | None = None) -> None:
        """Forget what is kept for ``values``, or all."""
        with self._lock:
            if values is None:
                self._kept.clear()
            else:
                self._kept.pop(values, None)

    def nbytes(self, values: Tensor) -> int:
        """Bytes of what is kept for ``values``."""
        with self._lock:
            return sum(kept.operand.nbytes for kept in self._kept.get(values, {}).values())

    def _may_keep(self, values: Tensor, masks: tuple[Tensor, ...]) -> bool:
        if any(tensor.is_inference() for tensor in (values, *masks)):
            _say_inference()
            return False
        return values not in self._passing and not replayed(values.device)

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
            for values in [tensor for tensor in self._kept if tensor.requires_grad]:
                del self._kept[values]

    def _forget_freed(self) -> None:
        for values in list(self._kept):
            if values.untyped_storage().nbytes() == 0:
                del self._kept[values]
                self._passing[values] = True


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
        "slope_fx's cusparselt engine makes its operands anew at each use: the weights are "
        "inference tensors, whose changes can't be seen. Load them outside of "
        "torch.inference_mode() to have the operands kept.",
        EngineWarning,
        stacklevel=2,
    )
