"""Which modules are compiled, each as one graph: the whole model, or its repeated blocks."""

from collections.abc import Iterable
from typing import Literal

from torch import nn

Region = Literal["model", "blocks"]


def choose_regions(model: nn.Module, region: Region, scopes: Iterable[str]) -> list[str]:
    """Paths of the modules to compile, "" for the model itself.

    Args:
        model: the model.
        region: "model" for one graph; "blocks" for the repeated blocks, compiled one by
            one (the same code serves them all), and for each sparse linear outside of
            them the module that calls it.
        scopes: paths of the modules whose forward calls a sparse linear.
    """
    if region == "model":
        return [""]
    blocks = _repeated_blocks(model)
    chosen = set()
    for scope in scopes:
        containing = [b for b in blocks if scope == b or scope.startswith(f"{b}.")]
        chosen.add(min(containing, key=len) if containing else scope)
    inside = {c for c in chosen if any(o == "" or c.startswith(f"{o}.") for o in chosen if o != c)}
    return sorted(chosen - inside)


def _repeated_blocks(model: nn.Module) -> set[str]:
    """Members of a ModuleList that holds two or more modules of one class."""
    blocks = set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if len({type(block) for block in module}) == 1:
            blocks |= {f"{path}.{i}" if path else str(i) for i in range(len(module))}
    return blocks
