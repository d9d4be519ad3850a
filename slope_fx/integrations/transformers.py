"""The callback for the Trainer of transformers."""

import logging
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from slope_fx.checkpoints import describe_checkpoint
from slope_fx.errors import ArgumentError, ArgumentWarning, StateError
from slope_fx.record import sparse_weights, sparsity_of
from slope_fx.schedule import Schedule

log = logging.getLogger(__name__)


def _check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Refuse a low-rank optimizer without low-rank parameters of sparse layers.

    The Trainer selects the targets of GaLore and APOLLO by the parameter name "weight". Sparse
    layers have no such parameter, so plain AdamW would train them.

    Raises:
        ArgumentError: no low-rank group has values of a sparse layer.
    """
    groups = [g for g in getattr(optimizer, "param_groups", ()) if g.get("rank") is not None]
    values = {id(weight.values) for weight in sparse_weights(model).values()}
    if groups and not any(id(p) in values for group in groups for p in group["params"]):
        raise ArgumentError(
            "optim_target_modules reaches none of the sparse layers: it looks for parameters named "
            "weight, and theirs are named weight_values. Make the optimizer yourself, with "
            "[w.values for w in slope_fx.sparse_weights(model).values()] as the low-rank group, "
            "and pass it as Trainer(optimizers=(optimizer, None))."
        )


class SlopeCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Sets the phases in the Trainer: ``Trainer(model, ..., callbacks=[SlopeCallback()])``.

    The callback makes a :class:`slope_fx.Schedule` with the Trainer's number of steps, and steps
    it after the optimizer. It adds ``slope/adapter_phase`` (0 or 1) and ``slope/sparsity`` (the
    fraction of zeros in all linear weights) to the training logs. It adds a manifest to each
    ``checkpoint-N``, so that ``slope_fx.load_pretrained`` can load it. After
    ``resume_from_checkpoint``, it restores the phase.

    Args:
        adapter_start, backward_mask_interval: as for :class:`slope_fx.Schedule`.

    Raises:
        ArgumentError: if the Trainer is made with ``torch_compile=True``; at the start of
            training, if ``optim_target_modules`` includes no sparse layer.
        StateError: at the start of training, if the model is not compiled by slope_fx, or a
            resumed run had another Schedule or no SlopeCallback.
    """

    def __init__(
        self, adapter_start: float | None = None, backward_mask_interval: int | None = 100
    ) -> None:
        self.adapter_start = adapter_start
        self.backward_mask_interval = backward_mask_interval
        self.schedule: Schedule | None = None
        self._sparsity = 0.0

    def state(self) -> dict[str, Any]:
        """The state for ``trainer_state.json``."""
        arguments = {
            "adapter_start": self.adapter_start,
            "backward_mask_interval": self.backward_mask_interval,
        }
        saved = None if self.schedule is None else self.schedule.state_dict()
        return {"args": arguments, "attributes": {"saved": saved}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse ``torch_compile=True``, which would compile the model a second time."""
        if args.torch_compile:
            raise ArgumentError(
                "torch_compile=True would compile the model a second time, around the sparse "
                "weights, which then run dense. Leave it out: slope_fx.compile has compiled the "
                "model. Pass torch_compile_backend and torch_compile_mode to slope_fx.compile, as "
                "backend= and mode=."
            )

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Make the Schedule at the current step of the run."""
        assert model is not None
        _check_optimizer(model, kwargs.get("optimizer"))
        self.schedule = Schedule(
            model, state.max_steps, self.adapter_start, self.backward_mask_interval
        )
        self._sparsity = sparsity_of(model)
        if state.global_step == 0:
            return
        stored = state.stateful_callbacks.get(type(self).__name__)
        saved = stored["attributes"]["saved"] if isinstance(stored, dict) else None
        if saved is None:
            raise StateError(
                f"the run is resumed at step {state.global_step}, but its checkpoint was written "
                "without a SlopeCallback, so the phase it was in isn't known."
            )
        self.schedule.load_state_dict(saved)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step the Schedule."""
        assert self.schedule is not None
        if self.schedule.last_step == self.schedule.total_steps:
            return  # the Trainer takes one more step when a finished run is resumed
        before = self.schedule.phase
        self.schedule.step()
        if self.schedule.phase != before:
            log.info("step %d: the %s phase begins", self.schedule.last_step, self.schedule.phase)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the phase and the sparsity to the training logs."""
        if self.schedule is None or logs is None or "loss" not in logs:
            return
        more = {
            "slope/adapter_phase": float(self.schedule.phase == "adapter"),
            "slope/sparsity": self._sparsity,
        }
        logs.update(more)
        if state.log_history:
            state.log_history[-1].update(more)

    def on_save(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Add a manifest to the Trainer's checkpoint, so that ``load_pretrained`` can load it."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or model is None:
            return
        if not any(folder.glob("*.safetensors")):
            warnings.warn(
                f"{folder} has no safetensors file, so slope_fx.load_pretrained won't read it; "
                "the Trainer can still resume from it.",
                ArgumentWarning,
                stacklevel=2,
            )
            return
        describe_checkpoint(model, folder)
