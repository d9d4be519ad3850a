"""Optimizers that know nothing of slope_fx train a compiled model in both phases."""

import pytest
import torch
from torch import nn

import slope_fx
from training_runs import HALF, STEPS, assert_trained, copied, error, net, sparse_of


def low_rank(optimizer, model, **more):
    """As GaLore's README has it, of the parameters that train: ``weight_values``."""
    chosen = {id(weight.values): weight.values for weight in sparse_of(model)}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    options = {"rank": 4, "update_proj_gap": 3, "scale": 1.0, "proj_type": "std", **more}
    return optimizer([{"params": rest}, {"params": [*chosen.values()], **options}], lr=1e-2)


def muon(model):
    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)


def bitsandbytes(name, model):
    optim = pytest.importorskip("bitsandbytes").optim
    return getattr(optim, name)(model.parameters(), lr=1e-2)


def torchao(name, model):
    optim = pytest.importorskip("torchao.optim")
    return getattr(optim, name)(model.parameters(), lr=1e-2)


def galore(model):
    return low_rank(pytest.importorskip("galore_torch").GaLoreAdamW, model)


def apollo(model):
    optimizer = pytest.importorskip("apollo_torch").APOLLOAdamW
    return low_rank(optimizer, model, proj="random", scale_type="channel")


def schedule_free(model):
    optim = pytest.importorskip("schedulefree")
    return optim.AdamWScheduleFree(model.parameters(), lr=1e-2)


OPTIMIZERS = {  # and what shows that the state of a layer's values is what the optimizer is for
    "RAdam": (lambda m: torch.optim.RAdam(m.parameters(), lr=1e-1), None),
    "Muon": (muon, lambda s, v: s["momentum_buffer"].shape == v.shape),
    "bitsandbytes 8 bit": (
        lambda m: bitsandbytes("AdamW8bit", m),
        lambda s, v: s["state1"].dtype == torch.uint8,
    ),
    "bitsandbytes paged": (
        lambda m: bitsandbytes("PagedAdamW8bit", m),
        lambda s, v: s["state1"].dtype == torch.uint8,
    ),
    "torchao 8 bit": (
        lambda m: torchao("AdamW8bit", m),
        lambda s, v: s["exp_avg"].codes.numel() == v.numel(),
    ),
    "torchao 4 bit": (
        lambda m: torchao("AdamW4bit", m),
        lambda s, v: s["exp_avg"].codes.numel() == v.numel() // 2,
    ),
    "GaLore": (galore, lambda s, v: 4 in s["exp_avg"].shape),
    "APOLLO": (apollo, lambda s, v: 4 in s["exp_avg"].shape),
    "schedule-free": (schedule_free, lambda s, v: s["z"].shape == v.shape),
}


@pytest.mark.filterwarnings("ignore:This implementation of AdamW:FutureWarning")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_others(name):
    make, as_intended = OPTIMIZERS[name]
    model, schedule = net()
    optimizer = make(model)
    if name == "schedule-free":
        optimizer.train()
    start, losses = copied(model), []
    for step in range(STEPS):
        if step == HALF:
            middle = copied(model)
        loss = error(model)
        loss.backward()
        # torchao compiles its arithmetic by Inductor, which takes longer than all of this.
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[HALF] < losses[0]
    assert_trained(model, start, middle)
    for weight in sparse_of(model):
        state = optimizer.state[weight.values]
        assert as_intended is None or as_intended(state, weight.values)


def test_the_weights_that_low_rank_recipes_look_for_are_refused():
    """``module.weight`` is no parameter of a sparse layer, and no optimizer takes it for one."""
    model, _ = net()
    chosen = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    with pytest.raises(
        slope_fx.errors.UnsupportedError, match=r"an optimizer can't train it.*parameters"
    ):
        torch.optim.AdamW(chosen)
