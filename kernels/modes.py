"""Isolation of slope_fx's own work from the modes of the caller.

slope_fx rewrites graphs and measures engines when a compiled module first runs. This can be within
a region that the caller checkpoints, or under a mode that counts operations. The modes must neither
see this work nor change it.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Disable the modes of the caller within this context, and keep the random state.

    The context disables gradients, inference mode, hooks of saved tensors (activation checkpointing
    counts the tensors that they see), autocast, TorchFunction and TorchDispatch modes (``with
    torch.device(...)`` is one), transforms of functorch and deterministic algorithms. It sets the
    default dtype to fp32.
    """
    autograd = torch._C._autograd
    with contextlib.ExitStack() as modes:
        modes.enter_context(_without_function_modes())
        modes.enter_context(_disable_current_modes())
        modes.enter_context(torch._C._DisableFuncTorch())
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        modes.callback(
            autograd._saved_tensors_hooks_set_tracing,
            autograd._saved_tensors_hooks_set_tracing(True),
        )
        if torch.get_default_dtype() is not torch.float32:
            modes.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if torch.are_deterministic_algorithms_enabled():
            modes.callback(
                torch.use_deterministic_algorithms,
                True,
                warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            )
            torch.use_deterministic_algorithms(False)
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        modes.enter_context(torch.random.fork_rng(devices=devices))
        yield


@contextlib.contextmanager
def _without_function_modes() -> Iterator[None]:
    popped = [_pop_mode() for _ in _get_current_function_mode_stack()]
    try:
        yield
    finally:
        for mode in reversed(popped):
            _push_mode(mode)
