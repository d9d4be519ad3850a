"""Training on several ranks, and the same training in one process."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import models
import slope_fx
from models import loss_of

STEPS, SHARE = 20, 2
LEARNING_RATE = 1e-3
Wrap = Callable[[nn.Module], nn.Module]


def compiled(name: str = "gpt2", backend: str = "aot_eager", seed: int = 0, **more: Any) -> Any:
    """A compiled model whose adapters, when they awake, add much."""
    torch.manual_seed(seed)
    options = {"adapter_rank": 2, "backend": backend, **more}
    model = slope_fx.compile(getattr(models, name)(), **options)
    for weight in slope_fx.sparse_weights(model).values():
        if weight.lora_B is not None:
            torch.nn.init.normal_(weight.lora_B, std=0.1)
    return model


def batch(step: int, rank: int) -> torch.Tensor:
    """The tokens of one rank at one step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, models.VOCABULARY, (SHARE, 12), generator=generator)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    # With the usual eps, Adam turns the rounding of a tiny gradient into a step of full length.
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-4)


def schedule_of(model: nn.Module, steps: int = STEPS, **more: Any) -> slope_fx.Schedule:
    with warnings.catch_warnings():  # the adapters are trained already
        warnings.simplefilter("ignore", slope_fx.errors.TrainingWarning)
        options = {"adapter_start": 0.5, "backward_mask_interval": 3, **more}
        return slope_fx.Schedule(model, steps, **options)


def alone(
    world: int, model: Any, steps: int = STEPS, first: int = 0, wrap: Wrap = lambda model: model
) -> dict[str, Any]:
    """Train in one process on the tokens of ``world`` ranks."""
    wrapped, optimizer = wrap(model), adamw(model)
    schedule, losses = schedule_of(model), []
    for step in range(first, steps):
        parts = []
        for rank in range(world):
            loss = loss_of(wrapped, batch(step, rank)) / world
            loss.backward()
            parts.append(loss.item())
        _step(optimizer, schedule)
        losses.append(sum(parts))
    return {"losses": losses, "state": whole_state(model)}


def together(
    model: Any,
    wrap: Wrap,
    steps: int = STEPS,
    first: int = 0,
    made: Callable[[Any, Any], None] | None = None,
    micro_batches: int = 1,
    share: int | None = None,
) -> dict[str, Any]:
    """Train on this rank, in a data-parallel wrapper.

    Args:
        model: the compiled model.
        wrap: makes the wrapper, or shards the model in place.
        steps, first: the steps to take are those from ``first`` to ``steps``.
        made: called with the optimizer and the Schedule ahead of the first step.
        micro_batches: number of batches whose gradients are accumulated.
        share: which part of the batch this rank has. None: that of its number.
    """
    wrapped, share = wrap(model), dist.get_rank() if share is None else share
    optimizer = adamw(model)
    schedule, losses = schedule_of(model), []
    if made is not None:
        made(optimizer, schedule)
    for step in range(first, steps):
        mean = torch.zeros(())
        for micro in range(micro_batches):
            last = micro == micro_batches - 1
            ids = batch(step, share * micro_batches + micro)
            with contextlib.nullcontext() if last else accumulating(wrapped):
                loss = loss_of(wrapped, ids) / micro_batches
                loss.backward()
            mean += loss.detach()
        _step(optimizer, schedule)
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return {"losses": losses, "state": whole_state(model)}


@contextlib.contextmanager
def accumulating(wrapped: Any) -> Iterator[None]:
    """Gradients are not averaged yet."""
    if hasattr(wrapped, "no_sync"):
        with wrapped.no_sync():
            yield
        return
    wrapped.set_requires_gradient_sync(False)
    yield
    wrapped.set_requires_gradient_sync(True)


def _step(optimizer: Any, schedule: slope_fx.Schedule) -> None:
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", slope_fx.errors.TrainingWarning)
        schedule.step()
    optimizer.zero_grad()


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole tensors of the model."""
    state = model.state_dict()
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in state.items()}


def assert_same(got: dict[str, Any], want: dict[str, Any], tolerance: float = 2e-5) -> float:
    """Losses and weights within rounding, and no bit of a mask different.

    Returns:
        The largest difference.
    """
    worst = max(abs(a - b) for a, b in zip(got["losses"], want["losses"], strict=True))
    assert worst < tolerance, (worst, got["losses"], want["losses"])
    assert got["state"].keys() == want["state"].keys()
    for name, value in want["state"].items():
        mine = got["state"][name]
        if value.dtype is torch.uint8:
            assert torch.equal(mine, value), f"{name} differs"
        else:
            difference = (mine - value).abs().max().item()
            assert difference < 20 * tolerance, (name, difference)
            worst = max(worst, difference)
    return worst
