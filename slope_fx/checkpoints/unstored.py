"""Buffers that no checkpoint stores, such as rotary frequencies, of a model that was emptied."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from slope_fx.errors import ArgumentWarning, users_stacklevel
from slope_fx.record import sparse_weights


def unstored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not in the state dict."""
    stored = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name not in stored}


@torch.no_grad()
def make_unstored_buffers(model: nn.Module, device: torch.device | None = None) -> None:
    """Make again the buffers that no checkpoint stores, if ``to_empty`` took their content.

    transformers' initialization of a module makes them. Those that it does not make stay as they
    are, with a warning that names them. A model that was not emptied is unchanged.

    Args:
        model: a compiled model that is about to be loaded.
        device: device of buffers that are on the meta device; None leaves these there.
    """
    emptied = any(
        weight.start is not None and weight.start.emptied and not weight.start.written
        for weight in sparse_weights(model).values()
    )
    left = []
    for owner, path, names in _owners(model):
        on_meta = [name for name in names if _buffer(owner, name).is_meta]
        for name in on_meta if device is not None else ():
            owner._buffers[name] = torch.empty_like(_buffer(owner, name), device=device)
        if (device is None and on_meta) or not (emptied or on_meta):
            continue
        made = _make(_initializer(model, path), owner, names)
        left += [f"{path}.{name}" if path else name for name in names if name not in made]
    if left:
        more = f" and {len(left) - 1} more buffers" if len(left) > 1 else ""
        warnings.warn(
            f"{left[0]}{more}: no checkpoint stores them, to_empty() took their content, and "
            "no initialization of transformers makes them. Compute them as the constructor of the "
            "model does, unless you have done so since to_empty().",
            ArgumentWarning,
            stacklevel=users_stacklevel(),
        )


def _owners(model: nn.Module) -> Iterator[tuple[nn.Module, str, list[str]]]:
    """The modules with such buffers, with their paths and the buffers' names."""
    found: dict[str, list[str]] = {}
    for name in unstored_buffers(model):
        path, _, attribute = name.rpartition(".")
        found.setdefault(path, []).append(attribute)
    for path, names in found.items():
        yield model.get_submodule(path), path, names


def _buffer(owner: nn.Module, name: str) -> Tensor:
    buffer = owner._buffers[name]
    assert buffer is not None
    return buffer


def _initializer(model: nn.Module, path: str) -> Callable[[nn.Module], Any] | None:
    """The ``_init_weights`` of the innermost model around a module, as transformers chooses it."""
    parts = path.split(".") if path else []
    around = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1))
    found = (getattr(module, "_init_weights", None) for module in around)
    return next((initialize for initialize in found if callable(initialize)), None)


def _make(
    initialize: Callable[[nn.Module], Any] | None, owner: nn.Module, names: list[str]
) -> set[str]:
    """Initialize the buffers of one module, and return the names of those that have content now.

    Such buffers come out the same, whatever they were before. All others get their content back.
    """
    if initialize is None:
        return set()
    before = {name: _buffer(owner, name).clone() for name in names}
    # Without parameters and submodules, so that the initialization changes only buffers.
    bare: nn.Module = object.__new__(type(owner))
    bare.__dict__.update({**owner.__dict__, "_parameters": {}, "_modules": {}})
    results = []
    for content in (0, 1):
        for name in names:
            _buffer(owner, name).fill_(content)
        # An AttributeError: it initializes a parameter or a submodule, so not these buffers.
        with contextlib.suppress(AttributeError):
            initialize(bare)
        results.append({name: _buffer(owner, name).clone() for name in names})
    made = {name for name in names if torch.equal(results[0][name], results[1][name])}
    for name in set(names) - made:
        _buffer(owner, name).copy_(before[name])
    return made
