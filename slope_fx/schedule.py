"""``Schedule``: refreshes backward masks and starts the adapter phase."""

import logging
import math
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.distributed.tensor import DTensor

from slope_fx.errors import ArgumentError, ArgumentWarning, StateError, TrainingWarning
from slope_fx.methods import Dense, method_of
from slope_fx.ops.dispatch import local
from slope_fx.record import sparse_weights, trainable_record_of
from slope_fx.sparse.agreement import check_agreement, check_stages, groups_of
from slope_fx.sparse.blank import settle
from slope_fx.sparse.shards import gather, reshard
from slope_fx.sparse.steps import after_step, check_whole, prepare
from slope_fx.sparse.weight import SparseWeight
from slope_fx.sparse.wrappers import check_idle

log = logging.getLogger(__name__)

PhaseName = Literal["sparse", "adapter"]
_DEFAULT_START = 0.99


@dataclass
class _Progress:
    """The progress of a Schedule, in an object that exists after the Schedule is collected.

    Attributes:
        total, adapter_step, has_adapters: as in the Schedule.
        step: number of steps so far.
        here: number of steps in this process.
    """

    total: int
    adapter_step: int
    has_adapters: bool
    step: int = 0
    here: int = 0

    def tell_if_early(self) -> None:
        """Warn if the Schedule, or the process, ended before the adapter phase."""
        wanted = self.has_adapters and self.adapter_step < self.total
        if wanted and self.here and self.step < self.adapter_step:
            warnings.warn(
                f"A Schedule ended at step {self.step} of total_steps={self.total}, before step "
                f"{self.adapter_step}, where the adapters begin: they took no part. If the run is "
                "over, make the Schedule with its number of optimizer steps. If the run continues "
                "later, load the Schedule's state_dict then.",
                TrainingWarning,
                stacklevel=2,
            )


class Schedule:
    """Sets the phases of a compiled model. It is used like a learning-rate scheduler.

    Args:
        model: the object that :func:`slope_fx.compile` returned.
        total_steps: number of optimizer steps of the whole run.
        adapter_start: fraction of ``total_steps`` after which the adapters are active, in [0, 1].
            With 1 they are never active; with less they are active in the last step at least.
            None: 0.99 as in the paper, or 0 if ``adapter_init`` is not "zero". Without adapters it
            has no effect.
        backward_mask_interval: number of optimizer steps between refreshes of the backward masks.
            None keeps the initial backward masks.

    Raises:
        ArgumentError: ``total_steps``, ``adapter_start`` or ``backward_mask_interval`` is out of
            range.
        UnsupportedError: the method needs whole weights, and they are sharded.
        StateError: ``model`` is not the object that ``compile`` returned, or is frozen, or it was
            compiled on the meta device and a layer is not initialized.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        adapter_start: float | None = None,
        backward_mask_interval: int | None = 100,
    ) -> None:
        _check_count("total_steps", total_steps)
        if backward_mask_interval is not None:
            _check_count("backward_mask_interval", backward_mask_interval, "; None for never")
        record = trainable_record_of(model)
        self._model, self._weights = model, list(sparse_weights(model).values())
        self._method = method_of(record.config.method)
        self._sharded: list[SparseWeight] = []
        self._agreed = False
        for weight in self._weights:
            settle(weight)
            check_whole(weight, first_step=False)
        self._has_adapters = any(weight.rank for weight in self._weights)
        if not self._weights:  # a stage of a pipeline without sparse layers keeps step
            sparse = not isinstance(self._method, Dense)
            self._has_adapters = sparse and record.config.adapter_rank is not None
        if adapter_start is None:
            # Adapters that approximate the pruned part belong to the initial model.
            at_work = record.config.adapter_init != "zero"
            adapter_start = 0.0 if at_work else _DEFAULT_START
            usual = True
        else:
            usual = adapter_start == _DEFAULT_START
        if not _is_number(adapter_start) or not 0 <= adapter_start <= 1:
            raise ArgumentError(
                f"adapter_start={adapter_start!r}; allowed is a fraction of total_steps from 0 "
                "(adapters from the first step) to 1 (never)."
            )
        if reason := self._method.without_effect(total_steps):
            warnings.warn(
                f'method="{self._method.name}" has no effect in this run: {reason}. Give the '
                "method a smaller interval, or leave it out.",
                ArgumentWarning,
                stacklevel=2,
            )
        self.total_steps = total_steps
        self.backward_mask_interval = backward_mask_interval
        # The slack keeps 0.99 * 100 from being 98.99999.
        self.adapter_step = math.floor(adapter_start * total_steps + 1e-9)
        self._progress = _Progress(total_steps, self.adapter_step, self._has_adapters)
        self._resumed = False
        weakref.finalize(self, _Progress.tell_if_early, self._progress)
        self._logged: PhaseName | None = None
        if not usual and not self._has_adapters:
            warnings.warn(
                f"adapter_start={adapter_start!r} has no effect: the model was compiled without "
                "adapters. Pass adapter_rank to slope_fx.compile to add adapters.",
                ArgumentWarning,
                stacklevel=2,
            )
        self._apply_phase()

    @property
    def last_step(self) -> int:
        """Number of optimizer steps so far."""
        return self._progress.step

    @property
    def phase(self) -> PhaseName:
        """The phase: "sparse", or "adapter" if the adapters are active."""
        return "adapter" if self._has_adapters and self.last_step >= self.adapter_step else "sparse"

    def step(self) -> None:
        """Count an optimizer step. Refreshes backward masks and starts the adapter phase when due.

        Raises:
            StateError: ``total_steps`` steps were already taken; or at the first step of a stage of
                a pipeline, the Schedule of another stage is different.
            UnsupportedError: at the first step, DeepSpeed's ZeRO holds adapters that are not active
                yet; or the method needs whole weights, and several processes train them in other
                ways than in a DistributedDataParallel.
        """
        if self.last_step >= self.total_steps:
            raise StateError(
                f"step() was called after the last of total_steps={self.total_steps}. Make the "
                "Schedule with the number of optimizer steps that the run takes."
            )
        if self.last_step == 0 and not self._resumed:
            self._warn_if_trained()
        self._progress.step += 1
        self._progress.here += 1
        if self._progress.here == 1:
            check_stages(self._weights, self.state_dict())
            for weight in self._weights:
                check_whole(weight, first_step=True)
        interval = self.backward_mask_interval
        due = interval is not None and self.last_step % interval == 0
        if due or self._method.steps:
            self._reshard()
        for weight in self._weights if self._method.steps else ():
            after_step(weight, self.last_step, self.total_steps)
        if due:
            for weight in self._weights:
                weight.refresh_backward_mask()
            log.info("step %d: backward masks refreshed", self.last_step)
        # At each step, because other code may have changed the phase, such as loading weights.
        self._apply_phase()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as a dict of plain numbers."""
        return {
            "last_step": self.last_step,
            "total_steps": self.total_steps,
            "adapter_step": self.adapter_step,
            "backward_mask_interval": self.backward_mask_interval,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a Schedule, and set the phase of the model.

        All ranks that train the model together call this, and are compared.

        Raises:
            StateError: ``state`` is from a Schedule with other arguments, or that of another rank
                is different.
            ArgumentError: ``state`` is not the state of a Schedule.
        """
        mine = self.state_dict()
        if not isinstance(state, Mapping) or set(state) != set(mine):
            got = f"the keys {list(state)}" if isinstance(state, Mapping) else type(state).__name__
            raise ArgumentError(f"state has {got}; a Schedule's has the keys {list(mine)}.")
        for key in ("total_steps", "adapter_step", "backward_mask_interval"):
            if state[key] != mine[key]:
                raise StateError(
                    f"state was saved by a Schedule with {key}={state[key]}; this one has "
                    f"{mine[key]}. Resume with the arguments of the interrupted run."
                )
        step = state["last_step"]
        if not _is_count(step) or not 0 <= step <= self.total_steps:
            raise ArgumentError(f"state has last_step={step!r}, outside of 0..{self.total_steps}.")
        self._progress.step = step
        self._resumed = True
        self._agreed = False
        self._apply_phase()

    def _apply_phase(self) -> None:
        for phase in {weight.phase for weight in self._weights}:
            phase.scheduled = True
            phase.set(self.phase == "adapter")
        for weight in self._weights if self._method.steps else ():
            prepare(weight, self.last_step, self.total_steps)
        if not self._agreed and groups_of(self._weights):
            check_agreement(self._weights, self.state_dict())
            self._agreed = True
        if self.phase != self._logged or self._progress.here == 1:
            # Again after the first step: the model may be sharded after the Schedule was made.
            self._reshard()
            for weight in self._weights if self.phase == "sparse" else ():
                check_idle(
                    weight.name, [f for f in (weight.lora_A, weight.lora_B) if f is not None]
                )
            factors = [f for w in self._weights for f in (w.lora_A, w.lora_B) if f is not None]
            gather(self._model, factors, self.phase == "adapter")
        if self.phase != self._logged:
            log.info("step %d: %s phase", self.last_step, self.phase)
            self._logged = self.phase

    def _reshard(self) -> None:
        """Let a model that FSDP2 shards have its sharded parameters, which a write must go to.

        Raises:
            StateError: a module outside of the model has gathered the parameters.
        """
        reshard(self._model)
        for weight in self._sharded:
            if not isinstance(weight.values, DTensor):
                raise StateError(
                    f"{weight.name} has whole values, where its shards are to be written: the "
                    "module on which fully_shard was called has gathered them. Call its "
                    "reshard() before Schedule.step()."
                )
        self._sharded = [weight for weight in self._weights if isinstance(weight.values, DTensor)]

    def _warn_if_trained(self) -> None:
        if self.phase == "sparse" and any(
            # A rank looks at its shards: nothing is sent for a warning.
            weight.lora_B is not None and local(weight.lora_B).any()
            for weight in self._weights
        ):
            warnings.warn(
                "The model's adapters are trained already, but this Schedule starts at step 0, "
                "where they take no part. To resume a run, load its Schedule's state_dict too.",
                TrainingWarning,
                stacklevel=3,
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_count(argument: str, value: object, more: str = "") -> None:
    if not _is_count(value) or int(value) < 1:  # type: ignore[call-overload]
        raise ArgumentError(f"{argument}={value!r}; allowed is a whole number from 1 up{more}.")
