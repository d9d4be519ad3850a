"""The modes and settings under which passes compile a graph."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch.fx import Node

from slope_fx.kernels.engines import AUTO, limited
from slope_fx.kernels.modes import undisturbed
from slope_fx.passes.graph import autocast_at


@dataclass(frozen=True)
class Context:
    """The modes and settings under which a graph is compiled. Passes read no others.

    Attributes:
        engines: allowed engines: "auto", or names separated by commas.
        training: whether gradients are enabled.
        autocast: (device type, dtype) for each device type with autocast enabled.
        replays: whether CUDA graphs are used. A replay computes all tensors again.
        certain: whether this is the only context in which the graph is called. Otherwise the
            ops choose their engines.
    """

    engines: str = AUTO
    training: bool = True
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    replays: bool = False
    certain: bool = True

    @classmethod
    def here(cls, engines: str = AUTO, replays: bool = False) -> "Context":
        """The context of the current modes and of the environment's limit on engines."""
        from torch._inductor import config as inductor_config  # takes seconds

        replays = replays or bool(inductor_config.triton.cudagraphs)
        return cls(limited(engines), torch.is_grad_enabled(), _autocast_now(), replays)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Set these modes, and no other modes of the caller, in a ``with`` block."""
        with undisturbed(), self.cast():
            yield

    def at(self, node: Node) -> "Context":
        """The context at a node, with the autocast regions that are open there in its graph."""
        with self.cast(), autocast_at(node):
            return dataclasses.replace(self, autocast=_autocast_now())

    @contextmanager
    def cast(self) -> Iterator[None]:
        """Set the autocast of this context, in a ``with`` block."""
        with ExitStack() as modes:
            for device, _ in _autocast_now():
                if device not in dict(self.autocast):
                    modes.enter_context(torch.autocast(device, enabled=False))
            for device, dtype in self.autocast:
                modes.enter_context(torch.autocast(device, dtype))
            yield

    def dtype_of(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a product with a tensor of this dtype, under autocast."""
        return dtype if dtype == torch.float64 else dict(self.autocast).get(device.type, dtype)


def _autocast_now() -> tuple[tuple[str, torch.dtype], ...]:
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    )
