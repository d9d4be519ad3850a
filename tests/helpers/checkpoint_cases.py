"""What the tests of checkpoints save and how they compare what comes back."""

import torch
from torch import nn

import models
import slope_fx
from models import batch, loss_of

BACKEND = {"backend": "eager", "on_fallback": "error"}


def trained(kind="gpt2", sparsity="2:4", rank=4, steps=2, dtype=torch.float32):
    """A model in its adapter phase, with the parts of its run."""
    model = models.TRANSFORMERS[kind]().to(dtype)
    slope_fx.compile(model, sparsity, adapter_rank=rank, **BACKEND)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = slope_fx.Schedule(model, steps, **({"adapter_start": 0.5} if rank else {}))
    for step in range(steps):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, {"optimizer": optimizer, "schedule": schedule}


def assert_same(got: nn.Module, want: nn.Module) -> None:
    assert list(got.state_dict()) == list(want.state_dict())
    for name, value in want.state_dict().items():
        assert got.state_dict()[name].dtype == value.dtype, name
        torch.testing.assert_close(
            got.state_dict()[name], value, rtol=0, atol=0, equal_nan=True, msg=name
        )


@torch.no_grad()
def logits(model):
    model.eval()
    return model(input_ids=batch(9)).logits
