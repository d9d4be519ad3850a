"""A model that ``fully_shard`` sharded before ``compile``.

FSDP2 decides at ``fully_shard`` which parameters a module gathers, and has no public way to replace
one. Here the tensors of a sparse weight take the place of the dense parameter in its group: the
values, both masks and the adapter become parameters as ``fully_shard`` makes them, on the same
ranks, with the same policies. They are sharded by rows, as by the default of ``fully_shard``.

One layer is whole on each rank at a time, because its masks are chosen from it.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo
from torch.distributed.tensor import DTensor

from slope_fx.sparse.shards import reshard, whole


class Member(NamedTuple):
    """A parameter of a group of FSDP2, which gathers its parameters together.

    Attributes:
        group: the group, torch's FSDPParamGroup.
        param: the parameter's entry in it, torch's FSDPParam.
    """

    group: Any
    param: Any


Places = list[tuple[nn.Module, str]]
"""The modules that have a parameter, each with its name there."""


def members(model: nn.Module) -> dict[int, Member]:
    """The sharded parameters in ``model`` by their ids. Gathered parameters are resharded."""
    reshard(model)
    return {
        id(param.sharded_param): Member(group, param)
        for state in _states(model)
        for group in state._fsdp_param_groups
        for param in group.fsdp_params
    }


def _states(model: nn.Module) -> list[Any]:
    """The states of FSDP2 in ``model``. Modules that were sharded together have one."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return list(dict.fromkeys(module._get_fsdp_state() for module in modules))


def gathered(dense: Tensor, member: Member | None) -> Tensor:
    """The whole tensor of a dense parameter, on the device of the computation. A collective."""
    if member is None or not isinstance(dense, DTensor):
        return dense
    if dense.is_meta:
        return torch.empty(dense.shape, dtype=dense.dtype, device="meta")
    return whole(dense.to(member.group.device))


def take_place(member: Member, new: list[Places], undo: ExitStack) -> None:
    """Put parameters into the place of a dense one, and shard them.

    Args:
        member: the dense parameter, which the modules don't have any more.
        new: the modules and names of each new parameter, which is whole on each rank. The modules
            get its shard.
        undo: receives callbacks that restore the group.
    """
    group, old = member
    _drop_hook(old)
    made = []
    for (module, name), *others in new:
        where = ParamModuleInfo(module, name, [m for m, _ in others], [n for _, n in others])
        param = FSDPParam(
            module._parameters[name],  # type: ignore[arg-type]
            where, old.mesh_info, old.post_forward_mesh_info, group.device, None, group.mp_policy,
            group.offload_policy,
        )  # fmt: skip
        if hasattr(old, "orig_dtype"):  # the model ran already, so lazy_init did this for others
            param.init_dtype_attrs(group.mp_policy)
        made.append(param)
    undo.callback(setattr, group, "fsdp_params", group.fsdp_params)
    place = next(i for i, param in enumerate(group.fsdp_params) if param is old)
    group.fsdp_params = [*group.fsdp_params[:place], *made, *group.fsdp_params[place + 1 :]]


def _drop_hook(param: Any) -> None:
    """Let loading a state dict not look for a parameter that its module no longer has."""
    module, number = param._module_info.module, param._post_load_hook_handle.id
    # A new dict: undo gives the module its old one.
    kept = [(key, hook) for key, hook in module._load_state_dict_post_hooks.items()]
    module.__dict__["_load_state_dict_post_hooks"] = OrderedDict(
        (key, hook) for key, hook in kept if key != number
    )


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Lets a sharded model be as before ``fully_shard``, on the meta device. Nothing is gathered.

    A model that is not sharded does not change.
    """
    states = _states(model)
    with ExitStack() as undo:
        if states:
            reshard(model)
            _describe(model, undo)
        for state in states:
            for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
                for one in getattr(handle, "handles", (handle,)):
                    hooks = one.hooks_dict_ref()
                    undo.callback(hooks.update, dict(hooks))
                    undo.callback(hooks.clear)  # called first
                    hooks.pop(one.id, None)
        yield


def _describe(model: nn.Module, undo: ExitStack) -> None:
    """Replace the tensors of ``model`` by tensors without data. Shared ones stay shared."""
    made: dict[int, Tensor] = {}

    def described(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty
        return made[id(tensor)]

    for module in model.modules():
        for kind in ("_parameters", "_buffers"):
            tensors = module.__dict__[kind]
            undo.callback(module.__dict__.__setitem__, kind, tensors)
            module.__dict__[kind] = {name: described(t) for name, t in tensors.items()}
