"""Which of its tile sizes a kernel runs with: the fastest in a race on the tensors at hand.

The measured choice is kept as ``racing`` keeps it, by kernel, sizes and dtypes, with tokens up to
a power of two. Where nothing can be measured (while a CUDA graph is captured, or in the
interpreter) the first of the space serves, which is the one for common sizes.
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
    """The configuration of ``space`` for a kernel and what ``key`` says of its problem.

    Args:
        kernel: its name.
        key: what its time depends on.
        space: what it may run with, the usual first.
        launch: runs it once with a configuration.
        device: where.
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
    """Those that this device has the shared memory and the registers for."""
    fitting, last = [], None
    for config in space:
        try:
            launch(config)
            fitting.append(config)
        except OutOfResources as error:
            last = error
    if not fitting:
        assert last is not None
        raise last
    return fitting


def forget() -> None:
    """Forget the choices of this process; those on disk stay."""
    _chosen.clear()
