"""A small run that tests of several ranks start, stop and resume."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import models
import slope_fx
from models import batch, loss_of
from slope_fx.sparse.shards import whole

STEPS = 12


class Run:
    """A model, its optimizer, a schedule of rates, and a Schedule: adapters from step 6 of 12."""

    def __init__(self, how, backend="eager", model=None):
        torch.manual_seed(0)
        if model is None:
            model = models.gpt2()
            slope_fx.compile(model, "2:4", adapter_rank=4, backend=backend, on_fallback="error")
        self.model = model
        self.wrapped = wrap(model, how)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.rates = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.schedule = slope_fx.Schedule(model, STEPS, 0.5, backward_mask_interval=2)
        self.parts = {
            "optimizer": self.optimizer, "rates": self.rates, "schedule": self.schedule,
        }  # fmt: skip

    def train(self, first, last):
        losses = []
        for step in range(first, last):
            loss = loss_of(self.wrapped, batch(seed=step))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.rates.step()
            self.schedule.step()
            losses.append(loss.item())
        return losses

    def tensors(self):
        """Copies of all tensors of the model, whole."""
        return wholes(self.model)

    def moments(self):
        """The optimizer's state by the name of the parameter, whole."""
        return {
            f"{name}.{key}": whole(value).clone() if isinstance(value, torch.Tensor) else value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }


def wholes(model):
    """Copies of all tensors of a model, whole."""
    return {name: whole(t.detach()).clone() for name, t in model.state_dict().items()}


def sent(tensors):
    """Tensors as a rank can return them."""
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def received(arrays):
    """What a rank returned by :func:`sent`."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def wrap(model, how):
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp":
        shard(model)
    return model


def shard(model, mesh=None):
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def mesh_of(*shape):
    names = ("a", "b", "c")[: len(shape)]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def differences(one, other):
    """Names of tensors that two dicts of tensors don't share bit for bit."""
    return [
        name for name in sorted({*one, *other})
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]  # fmt: skip
