"""``param_groups``: the groups of an optimizer that sparse training needs."""

from typing import Any

from torch import nn

from slope_fx.record import sparse_weights


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    sparse_lr: float | None = None,
    adapter_lr: float | None = None,
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
        adapter_lr: of "adapters"; None for ``lr``.

    Returns:
        Groups with the keys "name", "params", "lr" and "weight_decay".

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
    """
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
    return [
        {
            "name": name,
            "params": parameters,
            "lr": lr if rates.get(name) is None else rates[name],
            "weight_decay": weight_decay if name in ("sparse", "matrices") else 0.0,
        }
        for name, parameters in found.items()
        if parameters
    ]
