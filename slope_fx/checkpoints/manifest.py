"""The manifest ``slope_fx.json``, which describes a checkpoint and its model."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from safetensors import SafetensorError, safe_open

from slope_fx.checkpoints.files import previous_of, sha256
from slope_fx.errors import CheckpointError
from slope_fx.kernels.cpu.routes import FORM_DTYPES
from slope_fx.kernels.quantised import BITS, GROUPS
from slope_fx.methods import Slope
from slope_fx.passes.views import Layout
from slope_fx.planning.config import SlopeConfig
from slope_fx.planning.patterns import Pattern
from slope_fx.planning.plan import DensePlan, LinearPlan, SparsePlan
from slope_fx.planning.regions import Region
from slope_fx.record import Frozen

MANIFEST = "slope_fx.json"
FORMAT_VERSION = 5
"""Version 2 stores the configuration. For version 1 it is derived from the listed linears.

Version 3 stores the training state of several ranks. Version 4 stores a frozen model. Version 5
stores a method. A checkpoint is written in the oldest version that has all that it needs, so that
older versions of slope_fx read it.
"""
_OF_TRAINING, _FROZEN = 3, 4
BESIDE_PEFT = "slope_fx.peft"
"""The format of a manifest beside an adapter of PEFT (``pair.py``)."""
_FORMAT = "slope_fx"
REPLACED = "its layer was replaced after compile"
"""The reason of a linear that is planned as sparse, but that the saved model does not have."""


@dataclass(frozen=True)
class SparseEntry:
    """The data of a sparse layer that its tensors do not contain.

    Attributes:
        rank: rank of the adapter, or None without an adapter.
        scale: factor of the adapter's product.
        adapter_active: whether the adapter is active.
        dtype: dtype of the dense weight, if the values are quantised; else None.
    """

    rank: int | None
    scale: float
    adapter_active: bool
    dtype: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of ``slope_fx.json``.

    Attributes:
        version: version of slope_fx that wrote the checkpoint.
        model_class: class name of the model.
        transformers: whether transformers builds the model from ``config.json``.
        config, plans, untraced_because, graphs: as in :class:`slope_fx.record.Record`.
        sparse: layer name -> entry of each sparse linear.
        region: as in :class:`slope_fx.backend.Settings`.
        tensors: tensor name -> file name.
        aliases: other name of a shared tensor -> its name in ``tensors``.
        files: file name -> (size in bytes, SHA-256), for all files except the manifest.
        frozen: names of the parameters that do not train, without masks.
        inference: how the model was frozen; None for a model that trains. The layers of a frozen
            model have no backward masks, and their values are compressed in each storage.
        buffers: dtypes of the buffers that are not stored. A cast of the model changes them.
    """

    version: str
    model_class: str
    transformers: bool
    config: SlopeConfig
    plans: tuple[LinearPlan, ...]
    sparse: Mapping[str, SparseEntry]
    untraced_because: str
    region: str
    tensors: Mapping[str, str]
    aliases: Mapping[str, str]
    files: Mapping[str, tuple[int, str]]
    frozen: tuple[str, ...] = ()
    buffers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    graphs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    inference: Frozen | None = None

    def to_dict(self, format: str = _FORMAT) -> dict[str, Any]:
        """The manifest as plain data for JSON."""
        config = self.config.to_dict()
        version = _OF_TRAINING if self.inference is None else _FROZEN
        if config["method"] != Slope.name:
            version = FORMAT_VERSION
        else:
            del config["method"]
        data = {
            "format": format,
            "format_version": version,
            "slope_fx_version": self.version,
            "model": {"class": self.model_class, "transformers": self.transformers},
            "config": config,
            "untraced_because": self.untraced_because,
            "region": self.region,
            "linears": [_linear_to_json(p, self.sparse.get(p.name)) for p in self.plans],
            "tensors": dict(self.tensors),
            "aliases": dict(self.aliases),
            "files": {n: {"bytes": b, "sha256": h} for n, (b, h) in self.files.items()},
            "frozen": list(self.frozen),
            "buffers": dict(self.buffers),
            "graphs": dict(self.graphs),
        }
        if self.inference is not None:
            data["inference"] = dataclasses.asdict(self.inference)
        data["sha256"] = digest_of(data)
        return data

    @staticmethod
    def from_dict(data: dict[str, Any], source: str) -> "Manifest":
        """The manifest of plain data that :meth:`to_dict` returned, also in an older version.

        Args:
            data: the plain data.
            source: its name in error messages.

        Raises:
            CheckpointError: the data is damaged, or has a newer format version.
        """
        return _parsed(data, source)

    def write(self, folder: Path, format: str = _FORMAT) -> None:
        """Write the manifest into ``folder`` atomically."""
        partial = folder / f".{MANIFEST}.partial"
        partial.write_text(json.dumps(self.to_dict(format), indent=1) + "\n")
        os.replace(partial, folder / MANIFEST)


def read_manifest(path: str | os.PathLike[str], format: str = _FORMAT) -> Manifest:
    """Returns the manifest of the checkpoint in the folder ``path``.

    Args:
        path: the folder.
        format: the expected format.

    Raises:
        CheckpointError: the manifest is missing or damaged, or has a newer format version.
    """
    folder = Path(path)
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(_why_none(folder))
    try:
        data = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a manifest of slope_fx: {error!r:.200}.") from None
    return _parsed(data, str(file), format)


def _parsed(data: Any, file: str, format: str = _FORMAT) -> Manifest:
    try:
        found = data["format"], data["format_version"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a manifest of slope_fx: {error!r:.200}.") from None
    if found[0] == BESIDE_PEFT != format:
        raise CheckpointError(f"{file} is not of a checkpoint. {_CONVERT}")
    if found[0] != format or type(found[1]) is not int or found[1] < 1:
        raise CheckpointError(f"{file} has format {found[0]!r}, version {found[1]!r}; not ours.")
    if found[1] > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {found[1]}, written by slope_fx "
            f"{data.get('slope_fx_version')}; this one reads up to version {FORMAT_VERSION}. "
            "Upgrade slope_fx to load it."
        )
    if data.get("sha256") != digest_of(data):
        raise CheckpointError(
            f"{file} is damaged, or was edited: its SHA-256 differs. Copy the checkpoint again."
        )
    try:
        linears = [_linear_from_json(linear) for linear in data["linears"]]
        manifest = Manifest(
            version=data["slope_fx_version"],
            model_class=data["model"]["class"],
            transformers=data["model"]["transformers"],
            config=_config_of(data),
            plans=tuple(plan for plan, _ in linears),
            sparse={plan.name: entry for plan, entry in linears if entry is not None},
            untraced_because=data["untraced_because"],
            region=data["region"],
            tensors=data["tensors"],
            aliases=data["aliases"],
            files={n: (f["bytes"], f["sha256"]) for n, f in data["files"].items()},
            frozen=tuple(data["frozen"]),
            buffers=data["buffers"],
            graphs=data.get("graphs", {}),  # since 0.2
            inference=_inference_of(data),
        )
        problem = _problem(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}.") from None
    if problem:
        raise CheckpointError(f"{file} is damaged: {problem}.")
    return manifest


def digest_of(data: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest without its own ``sha256`` entry."""
    said = {name: value for name, value in data.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _problem(manifest: Manifest) -> str:
    """The reason why a manifest is invalid, or ""."""
    for name in manifest.files:
        parts = PurePosixPath(name).parts
        if not parts or "/".join(parts) != name or any(part.startswith(".") for part in parts):
            return f"{name!r} is no name of a file in the folder"
    for name, file in manifest.tensors.items():
        if file not in manifest.files:
            return f"{name} is in {file!r}, which isn't among its files"
    for alias, name in manifest.aliases.items():
        if name not in manifest.tensors or alias in manifest.tensors:
            return f"{alias} can't be another name of {name}"
    names = [plan.name for plan in manifest.plans]
    if len(set(names)) < len(names):
        return "a linear is listed twice"
    if manifest.region not in get_args(Region):
        return f"region={manifest.region!r}"
    if not all(type(number) is int for number in manifest.graphs.values()):
        return f"graphs={manifest.graphs}"
    for plan in manifest.plans:
        entry = manifest.sparse.get(plan.name)
        if entry is None or not isinstance(plan, SparsePlan):
            continue
        good = type(entry.adapter_active) is bool and (
            entry.rank is None or (type(entry.rank) is int and entry.rank > 0)
        )
        if not good or not isinstance(entry.scale, (int, float)) or not math.isfinite(entry.scale):
            return f"{plan.name} has {entry}"
        if manifest.inference is not None and entry.rank is not None and entry.scale != 1:
            return f"{plan.name} is frozen and has scale {entry.scale}"
        if manifest.inference is not None and manifest.inference.group:
            kinds = [str(kind).removeprefix("torch.") for kind in FORM_DTYPES]
            if entry.dtype not in kinds:
                return f"{plan.name} has quantised values and dtype {entry.dtype}"
        layout = plan.layout
        stack = () if layout.stack == 1 else (layout.stack,)
        if plan.shape != (*stack, layout.d_out, layout.d_in):
            return f"{plan.name} has shape {plan.shape} and {layout}"
    return ""


_CONVERT = "The folder holds a PEFT adapter: `slope-fx convert` makes a sparse checkpoint of it."


def _why_none(folder: Path) -> str:
    if not folder.is_dir():
        old = previous_of(folder.absolute())
        kept = f" Its last whole version is {old}: a write was interrupted." if old.is_dir() else ""
        return f"path={str(folder)!r} is not a folder.{kept}"
    hint = "Write checkpoints with slope_fx.save_pretrained."
    if (folder / "adapter_config.json").exists():
        hint = _CONVERT
    elif (folder / "config.json").exists():
        hint = (
            "It holds a model of transformers: if that is dense, load it with from_pretrained and "
            "call slope_fx.compile; if it was saved by the Trainer, add slope_fx's callback there."
        )
    return f"path={str(folder)!r} has no {MANIFEST}, so it is not a checkpoint of slope_fx. {hint}"


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """The size in bytes and the SHA-256 of each named file."""
    return {n: ((folder / n).stat().st_size, sha256(folder / n)) for n in sorted(names)}


def check_files(folder: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Check that each file of the manifest exists and is unchanged.

    Args:
        folder: folder of the checkpoint.
        manifest: its manifest.
        hashes: whether to check the hashes in addition to the sizes.

    Raises:
        CheckpointError: a file is missing or changed, or the folder has a safetensors file that
            the manifest does not list.
    """
    for name, (size, _) in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its {MANIFEST} lists.")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes where {size} were written: it is "
                "truncated or was replaced. Copy the checkpoint again."
            )
        if hashes:
            check_hashes(folder, manifest, [name])
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in manifest.files:
            raise CheckpointError(
                f"{file} is not listed in the checkpoint's {MANIFEST}. Remove it, or load the "
                "folder it came from."
            )


def check_hashes(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Check the hashes of some files of the manifest.

    Raises:
        CheckpointError: a file is changed.
    """
    for name in names:
        if sha256(folder / name) != manifest.files[name][1]:
            raise CheckpointError(
                f"{folder / name} is not what was written: its SHA-256 differs. Copy the "
                "checkpoint again."
            )


def tensor_names(file: Path) -> set[str]:
    """The names of the tensors in a safetensors file.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(str(file), "pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} can't be read: {error}.") from None


def _inference_of(data: dict[str, Any]) -> Frozen | None:
    told = data.get("inference")
    if told is None:
        return None
    frozen = Frozen(told["values"], told["group"])
    if frozen == Frozen() or (frozen.values in BITS and frozen.group in GROUPS):
        return frozen
    raise ValueError(f"inference={told}")


def _linear_to_json(plan: LinearPlan, entry: SparseEntry | None) -> dict[str, Any]:
    data = dataclasses.asdict(plan)
    if not isinstance(plan, SparsePlan):
        return {**data, "pattern": None}
    if entry is None:
        return {**data, "pattern": None, "reason": REPLACED}
    told = {key: value for key, value in dataclasses.asdict(entry).items() if key != "dtype"}
    if entry.dtype is not None:
        told["dtype"] = entry.dtype
    return {**data, "pattern": str(plan.pattern), **told}


def _linear_from_json(data: dict[str, Any]) -> tuple[LinearPlan, SparseEntry | None]:
    about = {
        "name": data["name"],
        "parameter_name": data["parameter_name"],
        "shape": tuple(data["shape"]),
        "scopes": tuple(data["scopes"]),
        "bytes_dense": data["bytes_dense"],
    }
    if data.get("pattern") is None:
        return DensePlan(**about, reason=data["reason"]), None
    plan = SparsePlan(
        **about,
        pattern=Pattern.parse(data["pattern"], "pattern"),
        layout=Layout(**{**data["layout"], "shape": tuple(data["layout"]["shape"])}),
        rows=tuple(data["rows"]),
    )
    entry = SparseEntry(data["rank"], data["scale"], data["adapter_active"], data.get("dtype"))
    return plan, entry


def _config_of(data: dict[str, Any]) -> SlopeConfig:
    """The configuration. For format version 1 it is derived from the listed linears."""
    if data["format_version"] > 1:
        return SlopeConfig.from_dict(data["config"])
    ranks = [linear["rank"] for linear in data["linears"] if linear.get("rank")]
    return SlopeConfig(
        {linear["name"]: linear["pattern"] for linear in data["linears"]},
        adapter_rank=max(ranks, default=None),
        adapter_init=data["adapter_init"],
    )
