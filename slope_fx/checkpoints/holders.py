"""Which ranks hold the right content of each tensor of a model.

Mostly all do. A rank of a pipeline holds only a part of the model, or trains only a part of it and
still holds the first content of the rest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slope_fx.checkpoints.tensors import Described
from slope_fx.checkpoints.together import Together
from slope_fx.errors import CheckpointError
from slope_fx.sparse.trained import was_trained

_CHUNK = 2**18
_FACTOR = 0x5851F42D4C957F2D  # of Knuth's MMIX generator


@dataclass(frozen=True)
class Chosen:
    """A tensor of the checkpoint.

    Attributes:
        name: its name in the checkpoint.
        aliases: other names of the same tensor.
        described: its shape and dtype.
        ranks: the ranks that hold its content, whole or, together, in shards.
    """

    name: str
    aliases: tuple[str, ...]
    described: Described
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class _Copy:
    """A tensor as some ranks hold it.

    Attributes:
        ranks: ranks that hold this content.
        names: all its names there.
        described: its shape and dtype.
        content: what tells contents apart, of :func:`content_of`.
        kind: "learns" for a trainable parameter, "mask" for a frozen one, or "buffer".
        trained: whether an optimizer of the ranks has trained it.
    """

    ranks: tuple[int, ...]
    names: tuple[str, ...]
    described: Described
    content: tuple[str | int, ...]
    kind: str
    trained: bool


def fingerprint(tensor: Tensor) -> int:
    """A number that differs for tensors of different bits, computed on the tensor's device."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = 0
    for start in range(0, data.numel(), _CHUNK):
        chunk = data[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(1, len(chunk) + 1, device=chunk.device) * _FACTOR
        # Products of odd numbers: no byte can change without changing its term.
        mixed = (chunk * 2 + 1) * (place | 1)
        part = int((mixed ^ (mixed >> 29)).sum())
        total = (total * 31 + part) % 2**63
    return total


def prints_of_shards(named: Mapping[str, Tensor], world: int) -> dict[str, int]:
    """The fingerprints of this rank's shards of tensors that not all ranks share.

    Such a tensor may be there several times: with two-dimensional parallelism, one that tensor
    parallelism leaves alone is sharded by each group of data-parallel ranks.
    """
    return {
        name: fingerprint(tensor.to_local())
        for name, tensor in named.items()
        if isinstance(tensor, DTensor) and tensor.device_mesh.size() < world
    }


def describe_copies(
    named: Mapping[str, Tensor], aliases: Mapping[str, str], prints: Sequence[Mapping[str, int]]
) -> list[list[object]]:
    """What this rank holds, as plain data for :func:`choose_holders`.

    Args:
        named, aliases: as from ``named_tensors``.
        prints: of all ranks, from :func:`prints_of_shards`.
    """
    others: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        others.setdefault(name, []).append(alias)
    held: list[list[object]] = []
    for name, tensor in named.items():
        learns = isinstance(tensor, nn.Parameter)
        kind = "buffer"
        if learns:
            kind = "learns" if tensor.is_floating_point() and tensor.requires_grad else "mask"
        held.append([
            [name, *others.get(name, ())], *Described.of(name, tensor).plain(),
            content_of(name, tensor, prints), kind, learns and was_trained(tensor),
        ])  # fmt: skip
    return held


def content_of(name: str, tensor: Tensor, prints: Sequence[Mapping[str, int]]) -> list[str | int]:
    """What tells the contents of a tensor on different ranks apart.

    Args:
        name: a name of the tensor on all ranks that hold it.
        tensor: the tensor.
        prints: of all ranks, from :func:`prints_of_shards`.

    Returns:
        Of a tensor that all ranks shard together, the ranks; of one that some do, the fingerprints
        of its shards in their order; of a whole tensor, its fingerprint, which one rank alone does
        not need.
    """
    if not isinstance(tensor, DTensor):
        return ["whole"] if len(prints) == 1 else ["whole", fingerprint(tensor)]
    ranks = tensor.device_mesh.mesh.flatten().tolist()
    if len(ranks) == len(prints):
        return ["sharded", *sorted(ranks)]
    return ["shards", *(prints[rank].get(name, 0) for rank in ranks)]


def choose_holders(together: Together, mine: list[list[object]]) -> list[Chosen]:
    """The tensors of the model that the ranks hold together, in the order of the first rank's.

    Args:
        together: the ranks.
        mine: what this rank holds.

    Raises:
        CheckpointError: ranks hold different contents of a tensor, and which is right is unknown.
    """
    different, which = together.distinct(mine)
    copies: list[_Copy] = []
    for index, held in enumerate(different):
        ranks = tuple(rank for rank in range(together.world) if which[rank] == index)
        copies += [
            _Copy(
                ranks, tuple(names), Described(tuple(shape), dtype), tuple(content), kind, trained
            )
            for names, shape, dtype, content, kind, trained in held
        ]
    trainers = _trainers(copies)
    return [_choose(group, trainers) for group in _groups(copies)]


def _groups(copies: Sequence[_Copy]) -> list[list[_Copy]]:
    """The copies of each tensor: those that share a name, on the same rank or on others."""
    group_of: dict[str, list[_Copy]] = {}
    groups: list[list[_Copy]] = []
    for copy in copies:
        known = [group_of[name] for name in copy.names if name in group_of]
        group: list[_Copy] = known[0] if known else []
        if not known:
            groups.append(group)
        for other in known[1:]:
            if other is not group:  # one rank ties what another one holds apart
                group.extend(other)
                groups[:] = [g for g in groups if g is not other]
                for name in {name for c in other for name in c.names}:
                    group_of[name] = group
        group.append(copy)
        for name in copy.names:
            group_of[name] = group
    return groups


def _trainers(copies: Iterable[_Copy]) -> dict[str, set[int]]:
    """Module path -> the ranks that have trained a parameter of it."""
    trainers: dict[str, set[int]] = {}
    for copy in copies:
        for path in _paths(copy.names[0]) if copy.trained else ():
            trainers.setdefault(path, set()).update(copy.ranks)
    return trainers


def _paths(name: str) -> list[str]:
    """The modules that contain a tensor, innermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _choose(group: list[_Copy], trainers: Mapping[str, set[int]]) -> Chosen:
    name = group[0].names[0]
    aliases = tuple(dict.fromkeys(n for copy in group for n in copy.names if n != name))
    for copy in group:
        if copy.described != group[0].described:
            raise CheckpointError(
                f"{name} is {group[0].described} on rank {group[0].ranks[0]} and {copy.described} "
                f"on rank {copy.ranks[0]}. Compile the model in the same way on all ranks."
            )
    right = group
    if len({copy.content for copy in group}) > 1:
        # A mask or a buffer is as old as the parameters beside it.
        trained = {rank for copy in group if copy.trained for rank in copy.ranks}
        near = (trainers[path] for path in _paths(name) if path in trainers)
        trained = trained or next(near, set())
        right = [copy for copy in group if trained.intersection(copy.ranks)]
        contents = {copy.content for copy in right}
        if group[0].kind == "buffer":
            # Ranks count their own batches, as in BatchNorm. DDP takes the first rank's too.
            right = right[:1] or group[:1]
        elif len(contents) != 1:
            raise CheckpointError(_disagreement(name, group, bool(contents)))
    ranks = {r for copy in group if copy.content == right[0].content for r in copy.ranks}
    return Chosen(name, aliases, group[0].described, tuple(sorted(ranks)))


def _disagreement(name: str, group: Sequence[_Copy], trained: bool) -> str:
    first = next(copy for copy in group if copy.content != group[0].content)
    ranks = f"ranks {group[0].ranks[0]} and {first.ranks[0]}"
    if trained:
        return (
            f"{name} differs between {ranks}, and both have trained it. Ranks that train the same "
            "parameter must share its gradient: wrap the model in DistributedDataParallel or "
            "fully_shard, or delete it on the ranks that don't run it."
        )
    return (
        f"{name} differs between {ranks}, and no optimizer of torch.optim has trained it on "
        "either, so which is right isn't known. Make it equal on all ranks, or delete it on the "
        "ranks that don't run it."
    )
