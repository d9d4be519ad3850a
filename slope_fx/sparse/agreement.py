"""Checks that the processes that train a model together have the same model and schedule."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from slope_fx.errors import StateError
from slope_fx.sparse.mask import fingerprint_of
from slope_fx.sparse.weight import SparseWeight
from slope_fx.sparse.wrappers import wrapper_of
from slope_fx.version import __version__


def _groups(weight: SparseWeight) -> list[dist.ProcessGroup]:
    """The groups of processes that train a weight together, in a wrapper or as shards."""
    values, wrapper = weight.values, wrapper_of(weight)
    groups = [] if wrapper is None else [wrapper.process_group]
    if isinstance(values, DTensor):
        groups += [values.device_mesh.get_group(dim) for dim in range(values.device_mesh.ndim)]
    return groups


def _fingerprint(weight: SparseWeight) -> int:
    """A number of the forward mask; of a sharded mask, that of the mask before."""
    bits = weight.forward_bits
    return weight.first_fingerprint if isinstance(bits, DTensor) else fingerprint_of(bits)


def groups_of(weights: Sequence[SparseWeight]) -> list[dist.ProcessGroup]:
    """The process groups of the wrappers and shards of ``weights``, each once."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    groups = {group.group_name: group for weight in weights for group in _groups(weight)}
    return [group for group in groups.values() if group.size() > 1]


def check_agreement(weights: Sequence[SparseWeight], schedule: Mapping[str, object]) -> None:
    """Compare the sparse layers, the schedule and the version of all ranks of each process group.

    This is a collective operation. A hash is compared first, and only if it differs what it is of.

    Args:
        weights: the sparse weights of the model.
        schedule: the state of its Schedule.

    Raises:
        StateError: on all ranks, if one differs from the others.
    """
    for group in groups_of(weights):
        mine = _of_schedule(schedule)
        for weight in weights:
            if group in _groups(weight):
                mine[f"layer {weight.name}"] = _described(weight, group)
        digest = hashlib.sha256(json.dumps(mine).encode()).hexdigest()
        digests: list[str] = [""] * group.size()
        dist.all_gather_object(digests, digest, group=group)
        if len(set(digests)) > 1:
            all_of_them: list[dict[str, str]] = [{}] * group.size()
            dist.all_gather_object(all_of_them, mine, group=group)
            raise StateError(_difference(dict(enumerate(all_of_them)), group))


_compared: Counter[str] = Counter()
"""How often the stages of a pipeline were compared in this process, by the name of the group."""


def check_stages(weights: Sequence[SparseWeight], schedule: Mapping[str, object]) -> None:
    """Compare the schedule and the version of this stage of a pipeline with the other stages.

    No rank waits for another one: a stage without sparse layers may have no Schedule. So the later
    one of two ranks that differ raises.

    Args:
        weights: the sparse weights of the stage.
        schedule: the state of its Schedule.

    Raises:
        StateError: a stage that compared before is different.
    """
    for group in {weight.phase.pipeline for weight in weights} - {None}:
        mine, store = _of_schedule(schedule), dist.distributed_c10d._get_default_store()
        told, _compared[group.group_name] = {}, _compared[group.group_name] + 1
        for i, rank in enumerate(dist.get_process_group_ranks(group)):
            key = f"slope_fx/{group.group_name}/{_compared[group.group_name]}/{rank}"
            if rank == dist.get_rank():
                store.set(key, json.dumps(mine))
                told[i] = mine
            elif store.check([key]):
                told[i] = json.loads(store.get(key))
        if any(one != mine for one in told.values()):
            raise StateError(_difference(told, group))


def _of_schedule(schedule: Mapping[str, object]) -> dict[str, str]:
    told = {f"the Schedule's {name}": str(value) for name, value in schedule.items()}
    return {"the version of slope_fx": __version__, **told}


def _described(weight: SparseWeight, group: dist.ProcessGroup) -> str:
    shape, rank = "x".join(map(str, weight.shape)), weight.rank or "none"
    told = f"{weight.pattern} {shape}, adapter rank {rank}, mask {_fingerprint(weight):016x}"
    if weight.factor is not None:
        told += f", factor {float(weight.factor):.9g}"
    return told + _copied(weight.lora_A, group)


def _copied(factor: Tensor | None, group: dist.ProcessGroup) -> str:
    """A fingerprint of an adapter's factor, if the ranks of a group should have equal shards of it.

    So it is with HSDP: FSDP2 averages the gradients of the replicas, and never compares the
    replicas. Returns "" for other factors. DDP needs no check, because it broadcasts parameters.
    """
    if not isinstance(factor, DTensor):
        return ""
    mesh, part = factor.device_mesh, factor.to_local().detach().contiguous()
    for dim, placement in enumerate(factor.placements):
        if placement.is_replicate() and mesh.get_group(dim).group_name == group.group_name:
            return f", adapter {fingerprint_of(part.view(torch.uint8)):016x}"
    return ""


def _difference(told: Mapping[int, Mapping[str, str]], group: dist.ProcessGroup) -> str:
    """What to say of ranks that differ.

    Args:
        told: rank in the group -> what it has.
        group: the process group.
    """
    names = list(dict.fromkeys(name for one in told.values() for name in one))
    wrong = [name for name in names if len({one.get(name) for one in told.values()}) > 1]
    name = wrong[0]
    (usual, _), *_ = Counter(one.get(name, "absent") for one in told.values()).most_common()
    others = [
        f"rank {dist.get_global_rank(group, i)}: {one.get(name, 'absent')}"
        for i, one in told.items()
        if one.get(name, "absent") != usual
    ]
    shown = "; ".join(others[:4]) + ("; and others" if len(others) > 4 else "")
    more = f" {len(wrong) - 1} more things differ." if len(wrong) > 1 else ""
    return (
        f"The ranks disagree about {name}: {shown}; the other ranks: {usual}.{more} Call compile "
        "and Schedule with the same arguments on all ranks, and give them the same model: the same "
        "seed, or one checkpoint."
    )
