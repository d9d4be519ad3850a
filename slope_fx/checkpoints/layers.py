"""Read the tensors of a checkpoint, by name and by layer."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from slope_fx.checkpoints.manifest import Manifest, tensor_names
from slope_fx.checkpoints.tensors import Described
from slope_fx.errors import CheckpointError
from slope_fx.frozen.install import FrozenParts, folded
from slope_fx.kernels.packing import packed_width
from slope_fx.methods import Slope, method_of
from slope_fx.planning.adapters import Adapter
from slope_fx.planning.masks import packed_masks_problem
from slope_fx.planning.plan import SparsePlan, sparse_name, sparse_plans, values_name
from slope_fx.sparse.blank import Start
from slope_fx.sparse.parts import Parts

_MOST_COPIED = 2**24  # bytes
_CHECKED_AT_ONCE = 2**17  # elements


class Reader:
    """Reads the tensors of a checkpoint by name.

    Args:
        folder: folder of the checkpoint.
        manifest: its manifest.
        device: device of the tensors. On "meta", no data is read.
        dtype: dtype of the floating-point tensors. None keeps the stored dtypes.
        mapped: whether tensors that keep their device and dtype are views of the files, which the
            system reads when they are used. Otherwise they are copies.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        mapped: bool = False,
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.device, self.dtype, self.mapped = device, dtype, mapped
        self.unread = set(manifest.tensors)
        self._open: dict[tuple[str, bool], Any] = {}
        self._stack = ExitStack()
        self._copied = 0

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: torch.dtype | None = None,
        *,
        cast: bool = True,
        view: bool = True,
    ) -> Tensor:
        """The tensor ``name``, on the device and in the dtype of the reader.

        Args:
            name: name of the tensor, or an alias of it.
            shape: the expected shape.
            kind: the expected stored dtype. None: any dtype.
            cast: whether to cast the tensor to the dtype of the reader.
            view: whether the tensor may be a view of the file.

        Raises:
            CheckpointError: the tensor is missing, or has another shape or dtype.
        """
        name = self.manifest.aliases.get(name, name)
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}, which the model needs.")
        part = self._file_of(name).get_slice(name)
        tensor = Described(tuple(part.get_shape()), part.get_dtype()).empty()
        if tuple(tensor.shape) != shape or (kind is not None and tensor.dtype != kind):
            want = f"{kind} {shape}" if kind is not None else f"{shape}"
            raise CheckpointError(
                f"{self.folder}: {name} is {tensor.dtype} {tuple(tensor.shape)}, where the model "
                f"needs {want}."
            )
        self.unread.discard(name)
        to = self.dtype if cast and tensor.is_floating_point() else None
        if self.device.type == "meta":
            return tensor.to(to or tensor.dtype)
        kept = self.device.type == "cpu" and to in (None, tensor.dtype)
        mapped = self.mapped and view and kept
        tensor = self._file_of(name, mapped).get_tensor(name)
        if mapped:
            return tensor
        copied = tensor.to(self.device, to or tensor.dtype, copy=True)
        self._copied += tensor.nbytes
        if self._copied > _MOST_COPIED:
            # What was read of a file stays in memory as long as it is open, or a view of it lives.
            self._close()
        return copied

    def check_mask(self, plan: SparsePlan) -> None:
        """Check the stored forward mask of a layer, and free its memory again.

        Raises:
            CheckpointError: it has another pattern.
        """
        name = f"{names_of(plan)[1]}forward_bits"
        name = self.manifest.aliases.get(name, name)
        with safe_open(str(self.folder / self.manifest.tensors[name]), "pt", device="cpu") as file:
            mask, d_in, pattern = file.get_tensor(name), plan.layout.d_in, plan.pattern
            # A mask that is checked whole needs more memory than its layer.
            parts = mask.split(max(1, _CHECKED_AT_ONCE // d_in))
            wrong = any(packed_masks_problem(part, None, d_in, pattern) for part in parts)
            problem = packed_masks_problem(mask, None, d_in, pattern) if wrong else ""
        if problem:
            raise CheckpointError(
                f"{self.folder}: {plan.name} should be {plan.pattern}, but {problem}."
            )

    def _file_of(self, name: str, mapped: bool = False) -> Any:
        """The open file of a tensor. Views of it and copies from it have a mapping each."""
        key = self.manifest.tensors[name], mapped
        if key not in self._open:
            opened = safe_open(str(self.folder / key[0]), "pt", device="cpu")
            self._open[key] = self._stack.enter_context(opened)
        return self._open[key]

    def _close(self) -> None:
        self._stack.close()
        self._open.clear()
        self._copied = 0


def check_names(folder: Path, manifest: Manifest) -> None:
    """Check that the files contain exactly the tensors that the manifest lists.

    A tensor may be there under its other names too, as the Trainer writes it under FSDP2.

    Raises:
        CheckpointError: a tensor is missing or not listed.
    """
    for file in sorted(set(manifest.tensors.values())):
        listed = {name for name, where in manifest.tensors.items() if where == file}
        found = tensor_names(folder / file)
        for name in sorted(listed - found):
            raise CheckpointError(f"{folder / file} lacks the tensor {name}.")
        for name in sorted(found - listed - manifest.aliases.keys()):
            raise CheckpointError(f"{folder / file} has {name}, which the checkpoint doesn't list.")


def read_layers(folder: Path, manifest: Manifest) -> None:
    """Read and check the tensors of each sparse layer.

    Raises:
        CheckpointError: a tensor has another shape or dtype, or a mask has another pattern.
    """
    frozen = manifest.inference is not None
    with Reader(folder, manifest, torch.device("cpu"), mapped=frozen) as reader:
        for plan in sparse_plans(manifest.plans):
            if frozen:
                read_frozen(plan, reader)
            else:
                read_parts(plan, reader)


def read_parts(plan: SparsePlan, reader: Reader) -> Parts:
    """The tensors of a sparse layer of a model that trains.

    Raises:
        CheckpointError: a tensor has another shape or dtype, or a mask has another pattern.
    """
    layout, pattern = plan.layout, plan.pattern
    entry = reader.manifest.sparse[plan.name]
    values, beside = names_of(plan)
    rows, width = layout.stack * layout.d_out, layout.d_in * pattern.n // pattern.m
    kept = _read_values(plan, reader, values)
    forward = reader.read(f"{beside}forward_bits", (rows, packed_width(layout.d_in)), torch.uint8)
    backward = reader.read(f"{beside}backward_bits", (rows, packed_width(width)), torch.uint8)
    problem = ""
    if not forward.is_meta:
        problem = packed_masks_problem(forward, backward, layout.d_in, pattern)
    if problem:
        raise CheckpointError(f"{reader.folder}: {plan.name} should be {pattern}, but {problem}.")
    adapter = None
    if entry.rank is not None:
        a, b = _read_adapter(plan, reader, entry.rank)
        adapter = Adapter(a, b, entry.scale, entry.adapter_active)
    start = Start(None) if kept.is_meta else None
    return Parts(kept, forward, backward, adapter, start, _read_factor(plan, reader))


def read_frozen(plan: SparsePlan, reader: Reader) -> FrozenParts:
    """The tensors of a sparse layer for inference, of either kind of checkpoint.

    Raises:
        CheckpointError: a tensor has another shape or dtype, or the mask has another pattern.
    """
    layout, pattern, manifest = plan.layout, plan.pattern, reader.manifest
    entry = manifest.sparse[plan.name]
    values, beside = names_of(plan)
    rows = layout.stack * layout.d_out
    kept, scales, group = _read_values(plan, reader, values), None, 0
    if manifest.inference is not None and manifest.inference.group:
        group = manifest.inference.group
        width = layout.d_in * pattern.n // pattern.m
        shape = (rows, -(-width // group))
        scales = reader.read(f"{beside}scales", shape, torch.bfloat16, cast=False)
    dtype = reader.dtype or (getattr(torch, str(entry.dtype)) if group else kept.dtype)
    bits = reader.read(f"{beside}forward_bits", (rows, packed_width(layout.d_in)), torch.uint8)
    reader.check_mask(plan)
    if manifest.inference is None:
        factor, method = _read_factor(plan, reader), method_of(manifest.config.method)
        if method.fades and factor is not None and factor > 0:
            raise CheckpointError(
                f"{reader.folder}: the pruned part of {plan.name} still takes part, with factor "
                f"{float(factor):g}. Train to the end of the fading before inference."
            )
        kept = method.values(kept, bits, factor, pattern)
    adapter = None
    if entry.rank is not None and entry.adapter_active:
        adapter = _read_adapter(plan, reader, entry.rank, cast=entry.scale == 1)
        if entry.scale != 1:
            adapter = folded(*adapter, entry.scale, reader.dtype)
    return FrozenParts(kept, bits, dtype, adapter, scales, group)


def for_inference(manifest: Manifest) -> Manifest:
    """A manifest without the tensors of the layers that a frozen model does not have."""
    if manifest.inference is not None:
        return manifest
    unneeded = set()
    for plan in sparse_plans(manifest.plans):
        _, beside = names_of(plan)
        unneeded.add(f"{beside}backward_bits")
        if not manifest.sparse[plan.name].adapter_active:
            unneeded |= {f"{beside}lora_A", f"{beside}lora_B"}
    unneeded = {manifest.aliases.get(name, name) for name in unneeded}
    return dataclasses.replace(
        manifest,
        tensors={n: file for n, file in manifest.tensors.items() if n not in unneeded},
        aliases={other: n for other, n in manifest.aliases.items() if n not in unneeded},
    )


def names_of(plan: SparsePlan) -> tuple[str, str]:
    """The name of the values of a layer, and the start of the names of its other tensors."""
    path, _, attribute = plan.parameter_name.rpartition(".")
    prefix = f"{path}." if path else ""
    return f"{prefix}{values_name(attribute)}", f"{prefix}{sparse_name(attribute)}."


def _read_values(plan: SparsePlan, reader: Reader, name: str) -> Tensor:
    layout, pattern, manifest = plan.layout, plan.pattern, reader.manifest
    frozen = manifest.inference
    if frozen is not None and frozen.group:
        width = layout.d_in * pattern.n // pattern.m
        int8 = frozen.values == "int8"
        codes = (layout.stack * layout.d_out, width if int8 else (width + 1) // 2)
        return reader.read(name, codes, torch.int8 if int8 else torch.uint8)
    method = Slope() if frozen is not None else method_of(manifest.config.method)
    shape = method.shape(layout.stack * layout.d_out, layout.d_in, pattern)
    kept = reader.read(name, shape)
    if not kept.is_floating_point():
        raise CheckpointError(f"{reader.folder}: the values of {plan.name} are {kept.dtype}.")
    return kept


def _read_factor(plan: SparsePlan, reader: Reader) -> Tensor | None:
    name = f"{names_of(plan)[1]}factor"
    name = reader.manifest.aliases.get(name, name)
    return reader.read(name, ()) if name in reader.manifest.tensors else None


def _read_adapter(
    plan: SparsePlan, reader: Reader, rank: int, *, cast: bool = True
) -> tuple[Tensor, Tensor]:
    layout, (_, beside) = plan.layout, names_of(plan)
    a = reader.read(f"{beside}lora_A", (layout.stack * rank, layout.d_in), cast=cast, view=cast)
    # A frozen weight copies B, to read it by columns.
    b = reader.read(f"{beside}lora_B", (layout.stack * layout.d_out, rank), cast=cast, view=False)
    return a, b
