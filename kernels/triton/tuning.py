"""The choice of the tile sizes of a kernel: the fastest in a race on the given tensors.

``racing`` keeps the result, by kernel, sizes, dtypes and the number of tokens up to a power of two.
Where no race is possible (during the capture of a CUDA graph, or in the interpreter), the first
entry of the list is used, which suits common sizes.
"""

import json
from collections.abc import Callable

import torch
from triton.runtime.errors import OutOfResources

from slope_fx.kernels import racing
from slope_fx.kernels.triton.configs import Config

_chosen: dict[tuple[object, ...], Config] = {}


def best(
    kernel: str,
    key: tuple[object, ...],
    space: list[Config],
    launch: Callable[[Config], None],
    device: torch.device,
) -> Config:
    """The fastest configuration of a kernel.

    Args:
        kernel: its name.
        key: the sizes and dtypes that its time depends on.
        space: the possible configurations, the default first.
        launch: runs the kernel once with a configuration.
        device: of the tensors.
    """
    known = (kernel, *key, device)
    if known not in _chosen:
        if device.type != "cuda" or not racing.can_measure(device):
            return space[0]
        _chosen[known] = _measured(json.dumps([kernel, *map(str, key)]), space, launch, device)
    return _chosen[known]


def _measured(
    entry: str, space: list[Config], launch: Callable[[Config], None], device: torch.device
) -> Config:
    by_name = {config.name: config for config in space}
    if len(by_name) == 1:
        return space[0]
    result = racing.recall(entry, tuple(by_name), device)
    if result is None:
        fitting = _fitting(space, launch)
        runs = {c.name: (lambda c=c: launch(c)) for c in fitting}
        result = racing.run(entry, lambda: runs, tuple(runs), device)
    return by_name[result.winner]


def _fitting(space: list[Config], launch: Callable[[Config], None]) -> list[Config]:
    """The configurations that fit the shared memory and the registers of the device."""
    fitting: list[Config] = []
    for number, config in enumerate(space, 1):
        try:
            launch(config)
            fitting.append(config)
        except OutOfResources:
            if number == len(space) and not fitting:
                raise
    return fitting


def forget() -> None:
    """Forget the choices of this process, but not those on disk."""
    _chosen.clear()
