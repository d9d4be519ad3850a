"""Write and read safetensors files a tensor, or a slice of a tensor, at a time."""

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from slope_fx.errors import CheckpointError

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Described:
    """A tensor without its data.

    Attributes:
        shape: of the whole tensor.
        dtype: its dtype as safetensors names it, such as "BF16".
    """

    shape: tuple[int, ...]
    dtype: str

    @staticmethod
    def of(name: str, tensor: Tensor) -> "Described":
        """Describes ``tensor``; of a sharded tensor, the whole one.

        Raises:
            CheckpointError: safetensors has no such dtype.
        """
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{name} is {tensor.dtype}, which safetensors can't hold.")
        return Described(tuple(tensor.shape), _NAMES[tensor.dtype])

    def plain(self) -> tuple[list[int], str]:
        """The shape and the dtype as data for JSON."""
        return list(self.shape), self.dtype

    def empty(self) -> Tensor:
        """A meta tensor of this kind."""
        return torch.empty(self.shape, dtype=_DTYPES[self.dtype], device="meta")

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.empty().nbytes


def ordered(described: Mapping[str, Described]) -> list[str]:
    """The names in the order of a file: wide dtypes first, so that all data is aligned."""
    return sorted(described, key=lambda name: (-described[name].empty().itemsize, name))


class TensorWriter:
    """Writes a safetensors file a tensor at a time, so that the others need no memory.

    Args:
        file: path of the new file.
        described: the tensors. They are added in the order of :func:`ordered`.
    """

    def __init__(self, file: Path, described: Mapping[str, Described]) -> None:
        self.file, self.names = file, ordered(described)
        self._digest, self._size = hashlib.sha256(), 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in self.names:
            kind, begin = described[name], end
            end += kind.nbytes
            header[name] = {
                "dtype": kind.dtype,
                "shape": kind.shape,
                "data_offsets": (begin, end),
            }
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)  # the data of a mapped file is then aligned
        self._open = file.open("wb")
        self._write(len(text).to_bytes(8, "little") + text)

    def add(self, tensor: Tensor) -> None:
        """Write the next tensor: whole, on the CPU and contiguous."""
        if tensor.nbytes:
            data = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
            self._write(memoryview(data))

    def close(self) -> tuple[int, str]:
        """Flush the file to the disk. Returns its size in bytes and its SHA-256."""
        with self._open:
            self._open.flush()
            os.fsync(self._open.fileno())
        return self._size, self._digest.hexdigest()

    def abandon(self) -> None:
        """Close the file after an error."""
        self._open.close()

    def _write(self, data: Any) -> None:
        self._open.write(data)
        self._digest.update(data)
        self._size += len(data)


class TensorReader:
    """Reads tensors of safetensors files by name, whole or the part of this rank.

    Args:
        folder: folder of the files.
        files: tensor name -> file name.
    """

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        self.folder, self.files = folder, files
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def describe(self, name: str) -> Described:
        """The shape and the dtype of a stored tensor."""
        part = self._file_of(name).get_slice(name)
        return Described(tuple(part.get_shape()), part.get_dtype())

    def read(self, name: str) -> Tensor:
        """A whole tensor on the CPU. It may be a view of the file."""
        tensor: Tensor = self._file_of(name).get_tensor(name)
        return tensor

    def read_slice(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A part of a tensor, on the CPU."""
        if 0 in shape:
            return torch.empty(tuple(shape), dtype=_DTYPES[self.describe(name).dtype])
        where = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        tensor: Tensor = self._file_of(name).get_slice(name)[where]
        return tensor

    def read_local(self, name: str, like: DTensor) -> Tensor:
        """The part of a tensor that this rank holds of ``like``, which has the same shape."""
        shape, offset = compute_local_shape_and_global_offset(
            like.shape, like.device_mesh, like.placements
        )
        return self.read_slice(name, offset, shape)

    def read_like(self, name: str, like: Tensor, *, sharded: bool) -> Tensor:
        """A tensor that belongs to a parameter, distributed as the parameter is.

        Args:
            name: name of the tensor.
            like: the parameter.
            sharded: whether the tensor was sharded when it was saved.

        Returns:
            A DTensor if ``like`` is one and the tensor has its shape, or was sharded; else the
            whole tensor.
        """
        shape = self.describe(name).shape
        if not isinstance(like, DTensor) or not (sharded or (shape and shape == like.shape)):
            return self.read(name).clone()
        mesh, device = like.device_mesh, like.to_local().device
        if shape == like.shape:
            # A copy, because a slice may be a view of the file.
            local = self.read_local(name, like).to(device, copy=True)
            return DTensor.from_local(
                local, mesh, like.placements, run_check=False, shape=like.shape,
                stride=torch.empty(shape, device="meta").stride(),
            )  # fmt: skip
        local = self.read(name).to(device, copy=True)
        return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)

    def _file_of(self, name: str) -> Any:
        file = self.files[name]
        if file not in self._open:
            opened = safe_open(str(self.folder / file), "pt", device="cpu")
            self._open[file] = self._stack.enter_context(opened)
        return self._open[file]
