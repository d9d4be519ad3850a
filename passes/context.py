"""What passes know of the world around a graph."""

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
    """The circumstances that a graph is compiled in. Passes ask nothing else.

    Attributes:
        engines: what may compute the products: "auto", or names separated by commas.
        training: whether gradients are on.
        autocast: the dtype that autocast makes of floats, by device type, where it is on.
        replays: whether CUDA graphs will be made, whose replays make everything anew.
    """

    engines: str = AUTO
    training: bool = True
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    replays: bool = False

    @classmethod
    def here(cls, engines: str = AUTO, replays: bool = False) -> "Context":
        """The circumstances now, with what the environment says of the engines."""
        autocast = tuple(
            (device, torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        )
        replays = replays or bool(inductor_config.triton.cudagraphs)
        return cls(limited(engines), torch.is_grad_enabled(), autocast, replays)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Run in these circumstances and no others, whatever modes the caller is in."""
        with undisturbed(), ExitStack() as modes:
            for device, dtype in self.autocast:
                modes.enter_context(torch.autocast(device, dtype))
            yield

    def at(self, node: Node) -> "Context":
        """The circumstances at a node: within the autocast regions that its graph has opened."""
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
        """What a tensor of that dtype is in a product."""
        return dtype if dtype == torch.float64 else dict(self.autocast).get(device.type, dtype)
