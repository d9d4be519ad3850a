"""``param_groups``: the groups of an optimizer that sparse training needs."""

import warnings
from typing import Any

from torch import nn

from slope_fx.errors import ArgumentError, ArgumentWarning
from slope_fx.record import sparse_weights


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    sparse_lr: float | None = None,
    adapter_lr: float | None = None,
    adapter_warmup: int = 0,
) -> list[dict[str, Any]]:
    """The parameters of a compiled model that train, in groups for any optimizer.

    The groups are "sparse" (the values of sparse weights), "adapters", "matrices" (other
    parameters of two dimensions or more, such as embeddings) and "vectors" (biases, norms). Decay
    acts on "sparse" and "matrices" only. A group without parameters is left out.

    Args:
        model: the object that ``compile`` returned.
        lr: learning rate of all groups that have no other.
        weight_decay: of "sparse" and "matrices".
        sparse_lr: of "sparse"; None for ``lr``. SuPar (arXiv 2405.15743) takes ``lr`` divided by
            the density.
        adapter_lr: of "adapters"; None for ``lr``. A schedule of learning rates scales it as the
            others: a cosine that ends at a tenth leaves adapters from 99% of the steps a tenth.
        adapter_warmup: number of steps over which the rate of "adapters" rises linearly, from the
            step in which they begin to take part. It works with all schedules of learning rates:
            the rate is changed within the step of the optimizer.

    Returns:
        Groups with the keys "name", "params", "lr" and "weight_decay"; "adapters" has
        "adapter_warmup" and "adapter_steps" too, if ``adapter_warmup`` is given.

    Raises:
        ArgumentError: ``adapter_warmup`` is not a whole number from 0 up.
        StateError: ``model`` is not the object that ``compile`` returned.
    """
    if type(adapter_warmup) is not int or adapter_warmup < 0:
        raise ArgumentError(
            f"adapter_warmup={adapter_warmup!r}; allowed is a whole number of steps from 0 up."
        )
    weights = list(sparse_weights(model).values())
    sparse = {id(weight.values) for weight in weights}
    adapters = {id(f) for w in weights for f in (w.lora_A, w.lora_B) if f is not None}
    found: dict[str, list[nn.Parameter]] = {
        name: [] for name in ("sparse", "adapters", "matrices", "vectors")
    }
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        name = "matrices" if parameter.dim() > 1 else "vectors"
        if id(parameter) in sparse:
            name = "sparse"
        elif id(parameter) in adapters:
            name = "adapters"
        found[name].append(parameter)
    rates = {"sparse": sparse_lr, "adapters": adapter_lr}
    given = {"sparse_lr": sparse_lr, "adapter_lr": adapter_lr, "adapter_warmup": adapter_warmup}
    for argument, value in given.items():
        kind = argument.partition("_")[0]
        if value and not found["sparse" if kind == "sparse" else "adapters"]:
            what = "sparse weights" if kind == "sparse" else "adapters"
            warnings.warn(
                f"{argument}={value!r} has no effect: the model has no {what} that train.",
                ArgumentWarning,
                stacklevel=2,
            )
    groups = [
        {
            "name": name,
            "params": parameters,
            "lr": lr if rates.get(name) is None else rates[name],
            "weight_decay": weight_decay if name in ("sparse", "matrices") else 0.0,
        }
        for name, parameters in found.items()
        if parameters
    ]
    for group in groups if adapter_warmup else ():
        if group["name"] == "adapters":
            group.update(adapter_warmup=adapter_warmup, adapter_steps=0)
    return groups
