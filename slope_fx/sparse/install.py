"""Install sparse weights in a model, in place, and remove them.

A layer keeps its identity and its attributes. Its class becomes a subclass with a property
``weight``. Layers of the same kind share the subclass, because Dynamo reuses a compiled graph
only for modules of the same class.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from slope_fx.errors import ArgumentWarning, UnsupportedError, users_stacklevel
from slope_fx.methods import Method
from slope_fx.planning.plan import SparsePlan, sparse_name, values_name
from slope_fx.sparse.fallback import Fallback, OnFallback
from slope_fx.sparse.mask import classes_kept
from slope_fx.sparse.parts import Choices, Parts, Shared
from slope_fx.sparse.phase import Phase
from slope_fx.sparse.sharded_first import Member, Places, gathered, members, take_place
from slope_fx.sparse.weight import SparseWeight


class _Kind(NamedTuple):
    """The base of a generated class, its weight properties, a hook for copies, and its methods."""

    base: type[nn.Module]
    attributes: tuple[str, ...]
    after_copy: Callable[[nn.Module], None] | None
    forward: Callable[..., Any] | None = None
    save_pretrained: Callable[..., Any] | None = None


@functools.cache
def _class_of(kind: _Kind) -> type[nn.Module]:
    """The class of a kind: a subclass of the base with the same name."""
    body: dict[str, Any] = {
        "__module__": kind.base.__module__,
        "__qualname__": kind.base.__qualname__,
        "__doc__": kind.base.__doc__,
        "_slope_kind": kind,
        "__reduce_ex__": _reduce,
        "requires_grad_": _requires_grad,
        "register_parameter": _register_parameter,
        "_apply": _apply,
        "qconfig": property(_no_qconfig, _refuse_qconfig),
        "_load_from_state_dict": _load_from_state_dict,
        **{attribute: _weight_property(attribute) for attribute in kind.attributes},
    }
    if kind.after_copy is not None:
        body["__setstate__"] = _setstate
    if kind.forward is not None:
        body["forward"] = kind.forward
    if kind.save_pretrained is not None:
        body["save_pretrained"] = kind.save_pretrained
    return type(kind.base.__name__, (kind.base,), body)


def _weight_property(attribute: str) -> property:
    sparse, values = sparse_name(attribute), values_name(attribute)

    def read(module: nn.Module) -> Tensor:
        weight: Tensor = getattr(module, sparse).read(getattr(module, values))
        return weight

    def write(module: nn.Module, value: object) -> None:
        _refuse_replacement(module, attribute)

    def delete(module: nn.Module) -> None:
        _refuse_replacement(module, attribute)

    doc = f"The dense W^R, rebuilt at each reading; what trains is `{values}`."
    return property(read, write, delete, doc=doc)


def _refuse_replacement(module: nn.Module, attribute: str) -> NoReturn:
    """Refuse ``layer.weight = other``, as in functional_call and quantization libraries.

    Raises:
        UnsupportedError: always.
    """
    name = getattr(module, sparse_name(attribute)).name
    raise UnsupportedError(
        f"{name}: its `{attribute}` can't be replaced or deleted, because it is made from "
        f"`{values_name(attribute)}` and the masks. To write a dense weight, call "
        f"slope_fx.sparse_weights(model)[{name!r}].write_(dense). For functional_call, pass "
        f"`{values_name(attribute)}`. To quantise, prune or parametrise it, make the model dense "
        "first: slope_fx.densify(model)."
    )


def _register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    kind: _Kind = type(module)._slope_kind  # type: ignore[attr-defined]
    for attribute in kind.attributes:  # "_orig" is torch.nn.utils.prune's
        if name in (attribute, f"{attribute}_orig"):
            _refuse_replacement(module, attribute)
    kind.base.register_parameter(module, name, param)


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    # A generated class cannot be imported by name, so copies and pickles store its kind.
    return _blank, tuple(type(module)._slope_kind), module.__getstate__()  # type: ignore[attr-defined]


def _requires_grad(module: nn.Module, requires_grad: bool = True) -> nn.Module:
    # As nn.Module.requires_grad_, but masks cannot require gradients. The parameters of a frozen
    # model refuse them, so they come first.
    for parameter in sorted(module.parameters(), key=lambda p: type(p) is nn.Parameter):
        if parameter.is_floating_point():
            parameter.requires_grad_(requires_grad)
    return module


def _load_from_state_dict(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    # With strict=False, as in the Trainer, torch would silently ignore a dense weight.
    kind: _Kind = type(module)._slope_kind  # type: ignore[attr-defined]
    for attribute in kind.attributes:
        if f"{prefix}{attribute}" in state_dict and f"{prefix}{values_name(attribute)}" not in (
            state_dict
        ):
            error_msgs.append(
                f"{prefix}{attribute} is the weight of a dense model, where this one has "
                f"{prefix}{values_name(attribute)}. Load dense weights before slope_fx.compile, or "
                "with slope_fx.checkpoints.load_dense(path, model)."
            )
    with classes_kept(module):
        kind.base._load_from_state_dict(
            module, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
            error_msgs,
        )  # fmt: skip
    for attribute in kind.attributes:  # with assign=True, each module got a parameter of its own
        getattr(module, sparse_name(attribute)).share()


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    # torch makes a new parameter in each module, such as in to_empty. A dense model is then tied
    # again by its own code, which can't reach the values.
    kind: _Kind = type(module)._slope_kind  # type: ignore[attr-defined]
    kind.base._apply(module, fn, recurse)
    for attribute in kind.attributes:
        getattr(module, sparse_name(attribute)).share()
    return module


def _no_qconfig(module: nn.Module) -> NoReturn:
    raise AttributeError("qconfig")


def _refuse_qconfig(module: nn.Module, qconfig: object) -> NoReturn:
    # torch.ao.quantization sets qconfig on all modules, and would silently skip sparse layers.
    raise UnsupportedError(
        "torch.ao.quantization can't quantise a model with sparse weights. Quantise a dense copy: "
        "slope_fx.densify(model)."
    )


def _blank(*kind: Any) -> nn.Module:
    cls = _class_of(_Kind(*kind))
    return cls.__new__(cls)


def _setstate(module: nn.Module, state: dict[str, Any]) -> None:
    nn.Module.__setstate__(module, state)
    type(module)._slope_kind.after_copy(module)  # type: ignore[attr-defined]


def set_kind(
    module: nn.Module,
    attributes: tuple[str, ...] = (),
    after_copy: Callable[[nn.Module], None] | None = None,
    forward: Callable[..., Any] | None = None,
    save_pretrained: Callable[..., Any] | None = None,
) -> None:
    """Replace the class of ``module`` by its generated subclass.

    Args:
        module: changed in place.
        attributes: names of weights, added to those of an earlier call.
        after_copy: called on a copy of the module. None keeps the function of an earlier call.
        forward, save_pretrained: replace methods. None keeps the function of an earlier call.
    """
    kind = getattr(type(module), "_slope_kind", _Kind(type(module), (), None))
    kind = _Kind(
        kind.base,
        tuple(sorted({*kind.attributes, *attributes})),
        after_copy or kind.after_copy,
        forward or kind.forward,
        save_pretrained or kind.save_pretrained,
    )
    module.__class__ = _class_of(kind)


def places_of(model: nn.Module) -> dict[int, Places]:
    """The places of each parameter of a model, by its id."""
    places: dict[int, Places] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, attribute))
    return places


def install(
    model: nn.Module,
    plans: Sequence[SparsePlan],
    make_parts: Callable[[SparsePlan, Tensor], Parts],
    method: Method,
    on_fallback: OnFallback,
    undo: ExitStack,
) -> list[tuple[Tensor, Tensor]]:
    """Replace the dense weight of each plan by a sparse weight.

    Args:
        model: changed in place.
        plans: plans of the sparse linears.
        make_parts: maps a plan and its dense parameter, whole if it is sharded, to the tensors that
            replace it.
        method: how the weights are stored and trained.
        on_fallback: what a layer does when it runs with its dense weight rebuilt.
        undo: receives callbacks that restore the model.

    Returns:
        The dense parameters that were replaced, each with its replacement.
    """
    sharded, locations = members(model), places_of(model)
    shared = Shared(method, Phase(), Choices())
    replaced: list[tuple[Tensor, Tensor]] = []
    hooked = []
    with plain_modes():
        for plan in plans:
            dense = model.get_parameter(plan.parameter_name)
            if dense._backward_hooks or dense._post_accumulate_grad_hooks:
                hooked.append(plan.parameter_name)
            places, member = locations[id(dense)], sharded.get(id(dense))
            fallback = Fallback(plan.name, on_fallback, method.when_expanded)
            _replace(plan, dense, member, places, make_parts, shared, fallback, undo)
            module, name = places[0]
            replaced.append((dense, module.get_parameter(values_name(name))))
    if hooked:
        warnings.warn(
            f"{hooked[0]}" + (f" and {len(hooked) - 1} more parameters" if hooked[1:] else "")
            + ": their hooks (register_hook, register_post_accumulate_grad_hook) are lost, because "
            "slope_fx.compile replaced the parameters. Register hooks after compile.",
            ArgumentWarning,
            stacklevel=users_stacklevel(),
        )  # fmt: skip
    return replaced


def _replace(
    plan: SparsePlan,
    dense: nn.Parameter,
    member: Member | None,
    places: Places,
    make_parts: Callable[[SparsePlan, Tensor], Parts],
    shared: Shared,
    fallback: Fallback,
    undo: ExitStack,
) -> None:
    """Replace a dense parameter in all modules that have it. A shared weight stays shared."""
    with torch.no_grad():
        parts = make_parts(plan, gathered(dense.detach(), member))
    values = nn.Parameter(parts.kept, requires_grad=dense.requires_grad)
    values.__dict__.update(dense.__dict__)  # such as _no_weight_decay
    sparse = SparseWeight(plan, *places[0], parts, shared, fallback)
    sparse.holders = tuple((module, values_name(name)) for module, name in places)
    for module, name in places:
        undo.callback(restore, module, type(module), dict(module.__dict__))
        module.__dict__["_parameters"] = dict(module._parameters)
        module.__dict__["_modules"] = dict(module._modules)
        del module._parameters[name]
        module.register_parameter(values_name(name), values)
        module.add_module(sparse_name(name), sparse)
        set_kind(module, (name,))
    if member is not None:
        new: list[Places] = [[(module, values_name(name)) for module, name in places]]
        new += [[(sparse, name)] for name, part in sparse._parameters.items() if part is not None]
        take_place(member, new, undo)


@contextmanager
def plain_modes() -> Iterator[None]:
    """Disables inference mode and autocast, which would affect the new parameters."""
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        for device in {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}:
            modes.enter_context(torch.autocast(device, enabled=False))
        yield


def uninstall(model: nn.Module, dense_of: Callable[[SparseWeight], Tensor]) -> None:
    """Replace all sparse weights by dense parameters.

    Args:
        model: changed in place.
        dense_of: maps a sparse weight to the dense weight in the shape of the layer's parameter.
    """
    made: dict[SparseWeight, nn.Parameter] = {}
    for module in list(model.modules()):
        kind = getattr(type(module), "_slope_kind", None)
        if kind is None:
            continue
        for attribute in kind.attributes:
            sparse = cast(SparseWeight, module._modules[sparse_name(attribute)])
            if sparse not in made:
                trains = sparse.values.requires_grad
                made[sparse] = nn.Parameter(dense_of(sparse), requires_grad=trains)
                made[sparse].__dict__.update(sparse.values.__dict__)
            del module._modules[sparse_name(attribute)], module._parameters[values_name(attribute)]
            # The weight comes before the bias, as in torch's layers.
            module.__dict__["_parameters"] = {attribute: made[sparse], **module._parameters}
        module.__class__ = kind.base


def restore(module: nn.Module, cls: type[nn.Module], state: dict[str, Any]) -> None:
    """Restore an earlier class and ``__dict__`` of ``module``."""
    module.__class__ = cls
    module.__dict__.clear()
    module.__dict__.update(state)
