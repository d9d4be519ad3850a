"""The modes and settings under which passes compile a graph."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch._inductor import config as inductor_config
from torch.fx import Node

from slope_fx.kernels.engines import AUTO, limited
from slope_fx.kernels.modes import undisturbed


@dataclass(frozen=True)
class Context:
    """The modes and settings under which a graph is compiled. Passes read no others.

    Attributes:
        engines: allowed engines: "auto", or names separated by commas.
        training: whether gradients are enabled.
        autocast: (device type, dtype) for each device type with autocast enabled.
        replays: whether CUDA graphs are used. A replay computes all tensors again.
    """

    engines: str = AUTO
    training: bool = True
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    replays: bool = False

    @classmethod
    def here(cls, engines: str = AUTO, replays: bool = False) -> "Context":
        """The context of the current modes and of the environment's limit on engines."""
        autocast = tuple(
            (device, torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        )
        replays = replays or bool(inductor_config.triton.cudagraphs)
        return cls(limited(engines), torch.is_grad_enabled(), autocast, replays)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Set these modes, and no other modes of the caller, in a ``with`` block."""
        with undisturbed(), ExitStack() as modes:
            for device, dtype in self.autocast:
                modes.enter_context(torch.autocast(device, dtype))
            yield

    def at(self, node: Node) -> "Context":
        """The context at a node, with the autocast regions that are open there in its graph."""
        opened: dict[Node, tuple[str, torch.dtype | None, bool]] = {}
        for before in node.graph.nodes:
            if before is node:
                break
            if before.target is torch.amp.autocast_mode._enter_autocast:
                opened[before] = before.args[:3]
            elif before.target is torch.amp.autocast_mode._exit_autocast:
                opened.pop(before.args[0], None)
        autocast = dict(self.autocast)
        for device, dtype, enabled in opened.values():
            if enabled:
                autocast[device] = dtype or torch.get_autocast_dtype(device)
            else:
                autocast.pop(device, None)
        return dataclasses.replace(self, autocast=tuple(autocast.items()))

    def dtype_of(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a product with a tensor of this dtype, under autocast."""
        return dtype if dtype == torch.float64 else dict(self.autocast).get(device.type, dtype)
