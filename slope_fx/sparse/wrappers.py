"""Sparse weights in a ``DistributedDataParallel``.

A DDP in its default settings waits in each backward pass for the gradients of all parameters that
it manages, and with ``static_graph=True`` for those of the first step. Adapters that are not active
yet have no gradients. So DDP does not manage adapters, and :class:`_Reducer` averages their
gradients when they are active.
"""

import sys
import weakref
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from slope_fx.errors import StateError, UnsupportedError

_BUCKET_BYTES = 25 * 2**20  # as DDP's
_reducers: "weakref.WeakKeyDictionary[DistributedDataParallel, _Reducer]"
_reducers = weakref.WeakKeyDictionary()
_wrappers: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[DistributedDataParallel]]"
_wrappers = weakref.WeakKeyDictionary()


def check_wrapper(name: str, values: Tensor) -> None:
    """Check that the DistributedDataParallel that runs now, if any, synchronises a layer's values.

    Args:
        name: of the layer.
        values: its trained parameter.

    Raises:
        StateError: the wrapper was made before ``compile``, and does not know the parameter.
    """
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None or any(p is values for p in wrapper._module_parameters):
        return
    raise StateError(
        f"{name}: the DistributedDataParallel around the model was made before compile and goes on "
        "synchronising the parameters that compile replaced. Call slope_fx.compile first, then "
        "wrap."
    )


def refuse_data_parallel() -> NoReturn:
    """Refuse ``torch.nn.DataParallel``, which copies a compiled model to several devices.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        "torch.nn.DataParallel can't copy a compiled model: each copy would call the original. Use "
        "torch.nn.parallel.DistributedDataParallel, with one process a device. The Trainer of "
        "transformers does so under torchrun; without it, CUDA_VISIBLE_DEVICES=0 limits it to one "
        "device."
    )


def ddp_that_asks() -> DistributedDataParallel | None:
    """The DDP that now collects the parameters to manage, or None.

    It calls ``named_parameters`` of each module. That call is the only moment at which a module can
    know that a DDP was made around it.
    """
    frame: Any = sys._getframe(2)
    for _ in range(4):  # the call is in nested comprehensions
        if frame is None:
            return None
        if frame.f_code in _ASKS:
            wrapper: DistributedDataParallel = frame.f_locals["self"]
            return wrapper
        frame = frame.f_back
    return None


_ASKS = (
    DistributedDataParallel._build_params_for_reducer.__code__,
    DistributedDataParallel._build_debug_param_to_name_mapping.__code__,  # and checks the former
)


def reduce_for(
    wrapper: DistributedDataParallel, weight: nn.Module, factors: Iterable[nn.Parameter]
) -> None:
    """Average the gradients of ``factors`` over the ranks of ``wrapper``, from now on.

    Args:
        wrapper: a DDP that does not manage the factors.
        weight: the sparse weight with the factors.
        factors: the factors of its adapter, if any. All ranks give them in the same order.
    """
    _wrappers[weight] = weakref.ref(wrapper)
    trained = [factor for factor in factors if factor.requires_grad]
    if trained:
        _reducers.setdefault(wrapper, _Reducer(wrapper)).add(trained)


def check_idle(name: str, factors: Iterable[nn.Parameter | None]) -> None:
    """Check that an optimizer can leave out the factors of an adapter that is not active yet.

    Args:
        name: of the layer.
        factors: the factors, if any.

    Raises:
        UnsupportedError: DeepSpeed's ZeRO holds a factor. It trains one flat tensor of all
            parameters, so an idle adapter would decay, and start with the step count of the values.
    """
    if any(hasattr(factor, "_hp_mapping") for factor in factors):  # set by ZeRO-1 and ZeRO-2
        raise UnsupportedError(
            f"{name}: DeepSpeed's ZeRO keeps one flat state for all parameters, and would update "
            "the adapters before their phase. Compile with adapter_rank=None, let the adapters "
            "take part from the first step with Schedule(adapter_start=0), or shard with FSDP2."
        )


def wrapper_of(weight: nn.Module) -> DistributedDataParallel | None:
    """The DDP that was last made around a sparse weight, or None."""
    wrapper = _wrappers.get(weight)
    return None if wrapper is None else wrapper()


def mean_over_ranks(weight: nn.Module, gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """The mean of a gradient over the ranks of the DDP around a sparse weight.

    This is a collective operation if there is one. A rank without a gradient adds zeros.

    Args:
        weight: the sparse weight.
        gradient: of this rank.
        like: a tensor of its shape, dtype and device.

    Returns:
        The mean; None if no rank has a gradient.
    """
    wrapper = wrapper_of(weight)
    if wrapper is None:
        return gradient
    mine = torch.zeros_like(like) if gradient is None else gradient
    found = mine.new_tensor([float(gradient is not None)])
    flat = torch.cat([mine.flatten(), found]).div_(dist.get_world_size(wrapper.process_group))
    dist.all_reduce(flat, group=wrapper.process_group)
    return flat[:-1].view_as(like) if flat[-1] > 0 else None


def _synchronises(wrapper: DistributedDataParallel) -> bool:
    """Whether a backward pass averages gradients: not if its forward pass was in ``no_sync()``."""
    # Each forward sets the first attribute. One under no_grad() sets it to False, and DDP goes on
    # averaging the gradients of the forward before. The second one is False within no_sync().
    return wrapper.require_forward_param_sync or wrapper.require_backward_grad_sync


class _Reducer:
    """Averages gradients at the end of each backward pass in which DDP averages gradients.

    Attributes:
        factors: the parameters, weakly held, in the order of the reduction.
        hooks: the id of a parameter -> its hook.
    """

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        self.factors: list[weakref.ref[nn.Parameter]] = []
        self.hooks: dict[int, Any] = {}
        self._wrapper = weakref.ref(wrapper)
        self._queued = False

    def add(self, factors: Iterable[nn.Parameter]) -> None:
        for factor in factors:
            if id(factor) in self.hooks:
                continue
            for other in _reducers.values():  # another DDP around the same model
                other._drop(factor)
            self.factors.append(weakref.ref(factor))
            hook = factor.register_post_accumulate_grad_hook(self._gradient_is_there)
            self.hooks[id(factor)] = hook

    def _drop(self, factor: nn.Parameter) -> None:
        hook = self.hooks.pop(id(factor), None)
        if hook is not None:
            hook.remove()
            self.factors = [kept for kept in self.factors if kept() is not factor]

    def _gradient_is_there(self, factor: Tensor) -> None:
        wrapper = self._wrapper()
        if wrapper is None or self._queued or not _synchronises(wrapper):
            return
        if wrapper._join_config.enable:
            raise UnsupportedError(
                "DistributedDataParallel.join() with active adapters: a rank that has run out of "
                "data would not take part in the average of the adapters' gradients. Give all "
                "ranks equally many batches, or compile with adapter_rank=None."
            )
        self._queued = True
        Variable._execution_engine.queue_callback(self._reduce)

    @torch.no_grad()
    def _reduce(self) -> None:
        self._queued = False
        wrapper = self._wrapper()
        assert wrapper is not None
        group, alive = wrapper.process_group, (ref() for ref in self.factors)
        factors = [factor for factor in alive if factor is not None]
        gradients = [torch.zeros_like(f) if f.grad is None else f.grad for f in factors]
        # The sum over ranks of the number of gradients. A factor without any keeps None.
        found = torch.tensor([float(f.grad is not None) for f in factors], device=factors[0].device)
        dist.all_reduce(found, group=group)
        for bucket in _take_tensors(gradients, _BUCKET_BYTES):
            flat = _flatten_dense_tensors(bucket).div_(dist.get_world_size(group))
            dist.all_reduce(flat, group=group)
            for gradient, mean in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                gradient.copy_(mean)
        for factor, gradient, count in zip(factors, gradients, found.tolist(), strict=True):
            if count and factor.grad is None:
                factor.grad = gradient
