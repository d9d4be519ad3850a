"""Write the tensors of a checkpoint: each file by one rank, all ranks at the same time."""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from torch.distributed.tensor import DTensor

from slope_fx.checkpoints.tensors import Described, TensorWriter, ordered
from slope_fx.checkpoints.together import Together
from slope_fx.errors import CheckpointError

STEM = "model"  # as transformers names the files
INDEX = f"{STEM}.safetensors.index.json"
_WORTH_A_FILE = 2**26  # bytes. With less in a file, more ranks would not write faster.


@dataclass(frozen=True)
class Wanted:
    """A tensor to write.

    Attributes:
        name: its name in the file.
        described: its shape and dtype.
        ranks: the ranks that hold it, whole or in shards. Each of them may write it.
    """

    name: str
    described: Described
    ranks: tuple[int, ...]


@dataclass
class File:
    """A file to write.

    Attributes:
        name: its name in the folder.
        tensors: the tensors, by name.
        rank: the rank that writes it.
        turn: the number of files that this rank writes before.
    """

    name: str
    tensors: dict[str, Described]
    rank: int
    turn: int
    ranks: tuple[int, ...] = field(default=())


def plan_files(
    wanted: Sequence[Wanted],
    writers: Iterable[int],
    max_size: int | str,
    stem: str,
) -> list[File]:
    """Divide tensors among files, and the files among the ranks that hold them.

    Args:
        wanted: the tensors.
        writers: the ranks that can write into the folder.
        max_size: maximum size of a file, in bytes or as "5GB".
        stem: start of the names of the files.

    Raises:
        CheckpointError: ``max_size`` has a value that is not allowed, or no rank that holds a
            tensor can write into the folder.
    """
    writers = set(writers)
    by_ranks: dict[tuple[int, ...], dict[str, Described]] = {}
    for tensor in wanted:
        by_ranks.setdefault(tensor.ranks, {})[tensor.name] = tensor.described
    load = dict.fromkeys(writers, 0)
    turns = dict.fromkeys(writers, 0)
    files: list[File] = []
    for ranks, described in by_ranks.items():
        able = sorted(writers.intersection(ranks))
        if not able:
            raise CheckpointError(
                f"{next(iter(described))} is only on ranks that don't see the folder of rank 0 "
                f"({', '.join(map(str, ranks[:8]))}). Save to a file system that all share."
            )
        for names in _split(described, max_size, len(able)):
            rank = min(able, key=lambda r: (load[r], r))
            content = {name: described[name] for name in names}
            files.append(File("", content, rank, turns[rank], ranks))
            load[rank] += sum(kind.nbytes for kind in content.values())
            turns[rank] += 1
    for number, file in enumerate(files, 1):
        count = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        file.name = f"{stem}{count}.safetensors"
    return files


def write_index(folder: Path, files: Sequence[File]) -> None:
    """Write the index by which transformers finds the tensors, if they are in several files."""
    if len(files) > 1:
        of_tensors = {name: file.name for file in files for name in file.tensors}
        size = sum(kind.nbytes for file in files for kind in file.tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": of_tensors}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _split(
    described: Mapping[str, Described], max_size: int | str, writers: int
) -> list[list[str]]:
    empty = {name: kind.empty() for name, kind in described.items()}
    try:
        files = split_torch_state_dict_into_shards(empty, max_shard_size=max_size)
        share = sum(tensor.nbytes for tensor in empty.values()) // writers + 1
        if writers > 1 and share > _WORTH_A_FILE and len(files.filename_to_tensors) < writers:
            files = split_torch_state_dict_into_shards(empty, max_shard_size=share)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"max_shard_size={max_size!r}: {error}.") from None
    return list(files.filename_to_tensors.values())


def write_files(
    together: Together, folder: Path, files: Sequence[File], held: Mapping[str, Tensor]
) -> dict[str, tuple[int, str]]:
    """Write the files. A collective operation.

    A sharded tensor is gathered on its ranks, one at a time, and kept only by the rank that writes
    it. A rank whose disk fails goes on with the gathering, so that the others don't wait for it.

    Args:
        together: the ranks.
        folder: an existing folder.
        files: from :func:`plan_files`.
        held: tensor name -> the tensor of this rank.

    Returns:
        File name -> size in bytes and SHA-256, on all ranks.

    Raises:
        OSError: the disk failed.
        CheckpointError: it failed on another rank.
    """
    order = sorted(
        (file.turn, place, number, name)
        for number, file in enumerate(files)
        for place, name in enumerate(ordered(file.tensors))
    )
    with _Writer(folder) as writer:
        for _, _, number, name in order:
            file = files[number]
            if together.rank not in file.ranks:
                continue
            writes = file.rank == together.rank
            tensor = held[name].detach()
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            if writes:
                writer.add(file, tensor)
            del tensor
        written, error = writer.finish()
    together.agree(error)
    return {name: about for part in together.gather(written) for name, about in part.items()}


class _Writer:
    """Writes the files of this rank in a thread, while the next tensor is gathered."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._file: tuple[File, TensorWriter] | None = None
        self._written: dict[str, tuple[int, str]] = {}
        self._error: Exception | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        if self._file is not None:
            self._file[1].abandon()

    def add(self, file: File, tensor: Tensor) -> None:
        """Write the next tensor. At most one waits to be written."""
        self._wait()
        if self._error is None:
            try:
                tensor = tensor.cpu().contiguous()
            except RuntimeError as error:  # no memory on the host
                self._error = error
                return
            self._last = self._thread.submit(self._add, file, tensor)

    def finish(self) -> tuple[dict[str, tuple[int, str]], Exception | None]:
        """Returns file name -> size and SHA-256 of the whole files, and the first error."""
        self._wait()
        if self._error is None:
            self._last = self._thread.submit(self._close)
            self._wait()
        return self._written, self._error

    def _wait(self) -> None:
        if self._last is not None:
            try:
                self._last.result()
            except Exception as error:
                self._error = error
            self._last = None

    def _add(self, file: File, tensor: Tensor) -> None:
        if self._file is None or self._file[0] is not file:
            self._close()
            self._file = file, TensorWriter(self._folder / file.name, file.tensors)
        self._file[1].add(tensor)

    def _close(self) -> None:
        if self._file is not None:
            (file, writer), self._file = self._file, None
            self._written[file.name] = writer.close()
