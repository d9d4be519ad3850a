"""The callback for Lightning's Trainer."""

import math
import sys
from typing import TYPE_CHECKING, Any

from slope_fx.errors import ArgumentError, StateError, UnsupportedError
from slope_fx.record import compiled_models, sparse_weights, sparsity_of
from slope_fx.schedule import Schedule

# The library has two package names. A Trainer requires callbacks from its own package.
if TYPE_CHECKING:
    Callback = object
elif "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback
else:
    from lightning.pytorch import Callback


class SlopeCallback(Callback):
    """Sets the phases in Lightning: ``Trainer(..., callbacks=[SlopeCallback()])``.

    The callback makes a :class:`slope_fx.Schedule` for each compiled model in the LightningModule,
    with the Trainer's number of optimizer steps, and steps it after the optimizer. If the Trainer
    has a logger, the callback logs ``slope/adapter_phase`` (0 or 1) and ``slope/sparsity`` (the
    fraction of zeros in all linear weights). Checkpoints of the Trainer include its state.

    Args:
        adapter_start, backward_mask_interval: as for :class:`slope_fx.Schedule`.

    Raises:
        ArgumentError: at the start of training, if the number of steps is unknown, or the Trainer
            has several optimizers.
        StateError: at the start of training, if the module has no compiled model, or a resumed
            run had another Schedule or no SlopeCallback.
        UnsupportedError: at the end of training, if another callback has averaged forward masks.
    """

    def __init__(
        self, adapter_start: float | None = None, backward_mask_interval: int | None = 100
    ) -> None:
        super().__init__()
        self.adapter_start = adapter_start
        self.backward_mask_interval = backward_mask_interval
        self.schedules: list[Schedule] = []
        self._saved: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state for Lightning's checkpoint."""
        return {"schedules": [schedule.state_dict() for schedule in self.schedules]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, when the Schedules are made."""
        # A state from before training, as from lr_find and the batch-size finder, has no Schedules.
        self._saved = state_dict["schedules"] or None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the Schedules at the current step of the run."""
        models = compiled_models(pl_module)
        if not models:
            raise StateError(
                f"{type(pl_module).__name__} holds no model that slope_fx.compile has been called "
                "on. Compile the model in it, in __init__ or configure_model."
            )
        if len(trainer.optimizers) > 1:
            raise ArgumentError(
                f"there are {len(trainer.optimizers)} optimizers, and Lightning counts the steps "
                "of all. Step a slope_fx.Schedule yourself, after the optimizer of the model."
            )
        total = trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ArgumentError(
                "the Trainer has no end, so the start of the adapter phase is not defined. Set its "
                "max_steps or max_epochs."
            )
        self.schedules = [
            Schedule(model, int(total), self.adapter_start, self.backward_mask_interval)
            for model in models
        ]
        if self._saved is not None:
            for schedule, saved in zip(self.schedules, self._saved, strict=True):
                schedule.load_state_dict(saved)
            self._saved = None
        elif trainer.global_step > 0:
            raise StateError(
                f"training goes on at step {trainer.global_step}, but the phase it was in isn't "
                "known: the checkpoint was written without a SlopeCallback, or this is a second "
                "fit. Give the first fit all of its steps, and resume from a checkpoint."
            )

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Choose backward masks again if a callback has averaged them.

        Lightning's StochasticWeightAveraging averages all parameters, including masks.
        """
        for model in compiled_models(pl_module):
            for weight in sparse_weights(model).values():
                problem = weight.masks_problem()
                if problem.startswith("forward"):
                    raise UnsupportedError(
                        f"{weight.name}: {problem}. Something averaged its masks, as a callback "
                        "that averages weights may: use Lightning's WeightAveraging."
                    )
                if problem:
                    weight.refresh_backward_mask()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the Schedules if the optimizer took a step."""
        for schedule in self.schedules:
            if schedule.last_step < trainer.global_step:
                schedule.step()
        if trainer.logger is not None and self.schedules:
            adapters = max(schedule.phase == "adapter" for schedule in self.schedules)
            pl_module.log("slope/adapter_phase", float(adapters))
            pl_module.log("slope/sparsity", sparsity_of(pl_module))
