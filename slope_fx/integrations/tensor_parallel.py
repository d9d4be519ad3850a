"""Tensor parallelism of transformers models by their own plan, as with ``tp_plan="auto"``.

``from_pretrained(tp_plan="auto")`` splits the weights while it reads them, and no N:M mask can be
chosen from a part. So compile first; :func:`parallelize` then splits values, masks and adapters.
"""

import re
import warnings
from collections.abc import Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from slope_fx.errors import ArgumentError, ArgumentWarning, UnsupportedError
from slope_fx.record import sparse_weights
from slope_fx.sparse.parallel import check_split

_STYLES: dict[str, ParallelStyle | None] = {
    "colwise": ColwiseParallel(),
    "colwise_rep": ColwiseParallel(output_layouts=Replicate()),
    "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel(),
    "rowwise_rep": RowwiseParallel(input_layouts=Replicate()),
    "rowwise_split_input": RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),
    "replicate": None,
}
"""transformers' names of styles, and the style of torch that computes the same."""


def parallelize(
    model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str] | None = None
) -> nn.Module:
    """Split a compiled transformers model over the ranks of ``mesh``. A collective.

    To read no more than its part, a rank makes the model on the meta device, calls this, and then
    loads the checkpoint into it by ``load_dense`` or ``slope_fx.load_pretrained``.

    Args:
        model: the compiled model, changed in place.
        mesh: the ranks, in one dimension.
        plan: name of a module, with ``*`` for numbers -> transformers' name of a style. None: the
            plan of the model, ``model.tp_plan``.

    Returns:
        ``model``.

    Raises:
        StateError: the model is not compiled, or a layer is sharded already.
        ArgumentError: the model has no plan, or the plan names no module of it.
        UnsupportedError: a style has no equal in torch, or a layer can't be split into equal parts.
            The model is then unchanged.
    """
    sparse = sparse_weights(model)
    plan = getattr(model, "tp_plan", None) if plan is None else plan
    if not plan:
        raise ArgumentError(
            f"{type(model).__name__} has no tp_plan. Pass plan=, or call torch's "
            "parallelize_module."
        )
    shared = _shared(model)
    chosen: dict[str, ParallelStyle] = {}
    unused = set(plan)
    for name, _ in model.named_modules():
        key = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        key = name if name in plan else key
        if key not in plan:
            continue
        unused.discard(key)
        kind = plan[key]
        if kind not in _STYLES:
            raise UnsupportedError(
                f"{name}: its style in the plan, {kind!r}, has no equal in torch.distributed; "
                f"there are {', '.join(_STYLES)}. Pass a plan= without it, or call torch's "
                "parallelize_module."
            )
        style = _STYLES[kind]
        if name in shared:
            warnings.warn(
                f"{name} shares its weight with another module, and stays whole on each rank.",
                ArgumentWarning,
                stacklevel=2,
            )
        elif style is not None:
            if name in sparse:
                check_split(sparse[name], int(isinstance(style, RowwiseParallel)), mesh.size())
            chosen[name] = style
    if unused:
        raise ArgumentError(f"plan[{sorted(unused)[0]!r}] names no module of the model.")
    for name, style in chosen.items():
        parallelize_module(model.get_submodule(name), mesh, style)
    return model


def _shared(model: nn.Module) -> set[str]:
    """The modules with a parameter that another module has too."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(path)
    return {path for paths in places.values() if len(paths) > 1 for path in paths}
