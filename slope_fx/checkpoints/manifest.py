"""``slope_fx.json``: what a checkpoint holds, and how the model is put together again."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from slope_fx.checkpoints.files import previous_of, sha256
from slope_fx.errors import CheckpointError, PatternError
from slope_fx.passes.views import Layout
from slope_fx.patterns import Pattern
from slope_fx.plan import LinearPlan

MANIFEST = "slope_fx.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SparseEntry:
    """What the tensors of a sparse layer don't say of it.

    Attributes:
        rank: of its adapter, or None.
        scale: what the adapter's product is multiplied by.
        adapter_active: whether the adapter takes part.
    """

    rank: int | None
    scale: float
    adapter_active: bool


@dataclass(frozen=True)
class Manifest:
    """All that is in ``slope_fx.json``.

    Attributes:
        version: of slope_fx, that wrote it.
        model_class: the name of the model's class; for people, and for transformers.
        transformers: whether transformers makes the model from ``config.json``.
        plans: the fate of each linear.
        sparse: the sparse ones, by the layer's name.
        untraced_because, region, adapter_init: as of :class:`slope_fx.compiler.Compilation`.
        tensors: name to file.
        aliases: other names of those tensors, where parameters are shared.
        files: name to size in bytes and SHA-256, of every file but this one.
    """

    version: str
    model_class: str
    transformers: bool
    plans: tuple[LinearPlan, ...]
    sparse: Mapping[str, SparseEntry]
    untraced_because: str
    region: str
    adapter_init: str
    tensors: Mapping[str, str]
    aliases: Mapping[str, str]
    files: Mapping[str, tuple[int, str]]

    def write(self, folder: Path) -> None:
        """Write it into ``folder``, in one step."""
        data = {
            "format": "slope_fx",
            "format_version": FORMAT_VERSION,
            "slope_fx_version": self.version,
            "model": {"class": self.model_class, "transformers": self.transformers},
            "untraced_because": self.untraced_because,
            "region": self.region,
            "adapter_init": self.adapter_init,
            "linears": [_linear_to_json(p, self.sparse.get(p.name)) for p in self.plans],
            "tensors": dict(self.tensors),
            "aliases": dict(self.aliases),
            "files": {n: {"bytes": b, "sha256": h} for n, (b, h) in self.files.items()},
        }
        partial = folder / f".{MANIFEST}.partial"
        partial.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(partial, folder / MANIFEST)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the checkpoint in the folder ``path``.

    Raises:
        CheckpointError: there is none, it isn't whole, or it is of a newer format version.
    """
    folder = Path(path)
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(_why_none(folder))
    try:
        data = json.loads(file.read_text())
        found = data["format"], data["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is no manifest of slope_fx: {error!r}.") from None
    if found[0] != "slope_fx" or not isinstance(found[1], int):
        raise CheckpointError(f"{file} has format {found[0]!r}, version {found[1]!r}; not ours.")
    if found[1] > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {found[1]}, written by slope_fx "
            f"{data.get('slope_fx_version')}; this one reads up to version {FORMAT_VERSION}. "
            "Upgrade slope_fx to load it."
        )
    try:
        linears = [_linear_from_json(linear) for linear in data["linears"]]
        return Manifest(
            version=data["slope_fx_version"],
            model_class=data["model"]["class"],
            transformers=data["model"]["transformers"],
            plans=tuple(plan for plan, _ in linears),
            sparse={plan.name: entry for plan, entry in linears if entry is not None},
            untraced_because=data["untraced_because"],
            region=data["region"],
            adapter_init=data["adapter_init"],
            tensors=data["tensors"],
            aliases=data["aliases"],
            files={n: (f["bytes"], f["sha256"]) for n, f in data["files"].items()},
        )
    except (KeyError, TypeError, AttributeError, PatternError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}.") from None


def _why_none(folder: Path) -> str:
    if not folder.is_dir():
        old = previous_of(folder.absolute())
        kept = f" Its last whole version is {old}: a write was interrupted." if old.is_dir() else ""
        return f"path={str(folder)!r} is not a folder.{kept}"
    hint = "Write checkpoints with slope_fx.save_pretrained."
    if (folder / "adapter_config.json").exists():
        hint = "It holds a PEFT adapter: `slope-fx convert` makes a sparse checkpoint of it."
    elif (folder / "config.json").exists():
        hint = (
            "It holds a model of transformers: if that is dense, load it with from_pretrained and "
            "call slope_fx.compile; if it was saved by the Trainer, add slope_fx's callback there."
        )
    return f"path={str(folder)!r} has no {MANIFEST}, so it is no checkpoint of slope_fx. {hint}"


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Size and hash of the named files."""
    return {n: ((folder / n).stat().st_size, sha256(folder / n)) for n in sorted(names)}


def check_files(folder: Path, manifest: Manifest, *, hashes: bool) -> None:
    """See that each file of the manifest is there and as it was written.

    Raises:
        CheckpointError: one is missing, of another size, or, with ``hashes``, of another content;
            or there are weights that the manifest doesn't know.
    """
    for name, (size, digest) in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its {MANIFEST} lists.")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes where {size} were written: it is "
                "truncated or was replaced. Copy the checkpoint again."
            )
        if hashes and sha256(file) != digest:
            raise CheckpointError(
                f"{file} is not what was written: its SHA-256 differs. Copy the checkpoint again."
            )
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in manifest.files:
            raise CheckpointError(
                f"{file} is not listed in the checkpoint's {MANIFEST}. Remove it, or load the "
                "folder it came from."
            )


def tensor_names(file: Path) -> set[str]:
    """The names of the tensors in a safetensors file.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        with safe_open(str(file), "pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} can't be read: {error}.") from None


def _linear_to_json(plan: LinearPlan, entry: SparseEntry | None) -> dict[str, Any]:
    data = dataclasses.asdict(plan)
    data["pattern"] = None if entry is None else str(plan.pattern)
    return data if entry is None else {**data, **dataclasses.asdict(entry)}


def _linear_from_json(data: dict[str, Any]) -> tuple[LinearPlan, SparseEntry | None]:
    layout = data["layout"]
    if layout is not None:
        layout = Layout(**{**layout, "shape": tuple(layout["shape"])})
    pattern = None if data["pattern"] is None else Pattern.parse(data["pattern"], "pattern")
    plan = LinearPlan(
        name=data["name"],
        parameter_name=data["parameter_name"],
        shape=tuple(data["shape"]),
        layout=layout,
        rows=tuple(data["rows"]),
        pattern=pattern,
        reason=data["reason"],
        scopes=tuple(data["scopes"]),
        bytes_dense=data["bytes_dense"],
    )
    if pattern is None:
        return plan, None
    return plan, SparseEntry(data["rank"], data["scale"], data["adapter_active"])
