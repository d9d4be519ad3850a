"""Choose the regions of a model: the modules that are compiled as one graph each."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import nn

from slope_fx.planning.plan import LinearPlan, SparsePlan

Region = Literal["auto", "model", "blocks"]
GRAPH = 4
"""The compile time of an additional graph without its ops, in units of linears."""


@dataclass(frozen=True)
class Regions:
    """The modules to compile.

    Attributes:
        paths: paths of the modules; "" is the model itself.
        kinds: a number for each module. Modules with the same number share a graph.
    """

    paths: tuple[str, ...] = ("",)
    kinds: tuple[int, ...] = (0,)

    @property
    def whole(self) -> bool:
        """Whether the model is compiled as one graph."""
        return self.paths == ("",)

    def present(self, model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
        """The kinds and the modules, without those that a stage of a pipeline does not have."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for path, kind in zip(self.paths, self.kinds, strict=True):
            if path in modules:
                yield kind, modules[path]


def choose_regions(
    model: nn.Module, region: Region, plans: Iterable[LinearPlan], graphs: Mapping[str, int]
) -> Regions:
    """Returns the regions of a model.

    Args:
        model: the model.
        region: "model": one graph. "blocks": the repeated blocks are compiled one by one, and
            blocks with equal graphs share code. For a sparse linear outside the blocks, the module
            that calls it is compiled. "auto": the blocks, if three quarters of the sparse linears
            are in blocks, and this compiles less code or torch.distributed is initialized; else one
            graph.
        plans: plans of the linears.
        graphs: module path -> number of its traced graph. Modules that are not in it are compared
            by the types of their submodules and by the shapes and dtypes of their tensors.
    """
    linear_plans = list(plans)
    # Of a model without sparse linears, as with method="dense", all count.
    sparse = [plan for plan in linear_plans if isinstance(plan, SparsePlan)] or linear_plans
    if region == "model":
        return Regions()
    graph_of = _graph_of(model, graphs)
    blocks = repeated_blocks(model, graphs)
    chosen = set()
    for scope in {scope for plan in sparse for scope in plan.scopes}:
        containing = [block for block in blocks if _within(scope, block)]
        chosen.add(min(containing, key=len) if containing else scope)
    chosen -= {c for c in chosen if any(c != other and _within(c, other) for other in chosen)}
    paths = sorted(chosen)
    numbers: dict[object, int] = {}
    kinds = []
    for path in paths:
        inside = sorted(
            (scope.removeprefix(path), str(getattr(plan, "pattern", None)), plan.shape)
            for plan in sparse
            for scope in plan.scopes
            if _within(scope, path)
        )
        key = (type(model.get_submodule(path)), graph_of(path), tuple(inside))
        kinds.append(numbers.setdefault(key, len(numbers)))
    # One module of each kind is compiled. The cost is its number of linears.
    linears = {kind: _linears_in(path, sparse) for path, kind in zip(paths, kinds, strict=True)}
    one_by_one = sum(linears.values()) + GRAPH * len(linears)
    # Around the blocks, wrappers of many ranks run Python code, which one graph can't contain.
    worse = not on_ranks() and one_by_one > _linears_in("", sparse) + GRAPH
    # Code around a linear that is compiled alone runs in eager mode.
    alone = sum(_linears_in(path, sparse) for path in chosen - blocks)
    if region == "auto" and (worse or 4 * alone > _linears_in("", sparse)):
        return Regions()
    return Regions(tuple(paths), tuple(kinds))


def on_ranks() -> bool:
    """Whether this process is a rank of torch.distributed."""
    return dist.is_available() and dist.is_initialized()


def _linears_in(path: str, plans: Sequence[LinearPlan]) -> int:
    return sum(_within(scope, path) for plan in plans for scope in plan.scopes)


def _within(path: str, module: str) -> bool:
    return module in ("", path) or path.startswith(f"{module}.")


def _graph_of(model: nn.Module, graphs: Mapping[str, int]) -> Callable[[str], object]:
    """A function from a module path to a key. Modules with equal graphs have equal keys."""

    def structure(path: str) -> object:
        module = model.get_submodule(path)
        types = tuple((name, type(part)) for name, part in module.named_modules())
        tensors = itertools.chain(module.named_parameters(), module.named_buffers())
        return types, tuple((name, t.shape, t.dtype) for name, t in tensors)

    return lambda path: graphs[path] if path in graphs else structure(path)


def repeated_blocks(model: nn.Module, graphs: Mapping[str, int]) -> set[str]:
    """Paths of the members of ModuleLists, ModuleDicts and Sequentials whose graphs repeat.

    If two members of the same type have equal graphs, all members of this type are included.

    Args:
        model, graphs: as for :func:`choose_regions`.
    """
    graph_of = _graph_of(model, graphs)
    blocks = set()
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            continue
        prefix = f"{path}." if path else ""
        alike: dict[type, list[str]] = {}
        for name, member in module.named_children():
            if next(member.children(), None) is not None:
                alike.setdefault(type(member), []).append(prefix + name)
        for members in alike.values():
            if len({graph_of(member) for member in members}) < len(members):
                blocks |= set(members)
    return blocks
