"""The quantizer by which ``from_pretrained`` of transformers opens a checkpoint of slope_fx."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from slope_fx.attach import attach, attach_frozen, make_record
from slope_fx.backend.settings import Settings
from slope_fx.checkpoints.filling import note_loaded
from slope_fx.checkpoints.layers import Reader, read_frozen, read_parts
from slope_fx.checkpoints.manifest import MANIFEST, Manifest, check_hashes, read_manifest
from slope_fx.checkpoints.tensors import TensorReader
from slope_fx.errors import ArgumentError, CheckpointError, UnsupportedError
from slope_fx.frozen import FrozenWeight
from slope_fx.frozen.install import FrozenParts, put_weight, sparse_places
from slope_fx.hub import QUANT_METHOD, unmark
from slope_fx.methods import method_of
from slope_fx.planning.plan import LinearPlan, SparsePlan, sparse_plans
from slope_fx.sparse.install import install, places_of, plain_modes
from slope_fx.sparse.mask import Mask
from slope_fx.sparse.parts import Parts


class SlopeFxConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a checkpoint. ``slope_fx.json`` has what it would say."""

    def __init__(self, **told: Any) -> None:
        self.quant_method = QUANT_METHOD


class SlopeFxQuantizer(HfQuantizer):  # type: ignore[misc]
    """Opens a checkpoint as it was saved: a compiled model that trains, or a frozen one.

    ``from_pretrained`` returns the same model as ``slope_fx.load_pretrained``.
    The layers get their sparse weights on the meta device, and transformers loads the tensors.
    """

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what the checkpoint can't be opened with.

        Raises:
            ArgumentError: the checkpoint is dense.
            UnsupportedError: parameters shall stay on the disk.
        """
        if not self.pre_quantized:
            raise ArgumentError(
                "quantization_config=SlopeFxConfig() can't make a dense model sparse. Load it "
                "without quantization_config, and call slope_fx.compile."
            )
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UnsupportedError(_NO_DISK)

    def update_attn_implementation(self, config: Any) -> Any:
        """Let transformers look for the files of the weights under their usual names."""
        unmark(config)
        return config

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        checkpoint_files: Any = None,
        **more: Any,
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedError(
                "from_pretrained can't split a checkpoint of slope_fx between ranks (tp_plan, "
                'distributed_config). Use slope_fx.load_pretrained(path, device="meta"), shard the '
                "model, and call slope_fx.load_pretrained(path, model)."
            )
        folder = _folder_of(model, checkpoint_files)
        self.manifest = manifest = read_manifest(folder)
        files = [Path(file).name for file in checkpoint_files]
        for name in files:
            if name not in manifest.files:
                raise CheckpointError(f"{folder / name} is not listed in its {MANIFEST}.")
        check_hashes(folder, manifest, files)
        self.plans = _plans_of(model, manifest)
        self.stored = {  # the plans by the stored names
            own.name: plan for own, plan in self.plans if isinstance(plan, SparsePlan)
        }
        self.settings = Settings.of(region=manifest.region)  # type: ignore[arg-type]
        dtype = dtype or model.dtype
        with Reader(folder, manifest, torch.device("meta"), dtype) as reader:
            self._install(model, reader)
        with TensorReader(folder, manifest.tensors) as stored:
            kinds = {stored.describe(name).empty().dtype for name in manifest.tensors}
        # Masks that are views of a file would keep what was read of it in memory.
        self.copies = not {kind for kind in kinds if kind.is_floating_point} <= {dtype}
        _mark_loaded(model, manifest)

    def _install(self, model: nn.Module, reader: Reader) -> None:
        """Install weights without data."""
        plans = [own for own, _ in self.plans if isinstance(own, SparsePlan)]
        if self.manifest.inference is not None:
            places = places_of(model)
            with plain_modes():
                for plan in plans:
                    parts = read_frozen(self.stored[plan.name], reader)
                    dense = model.get_parameter(plan.parameter_name)
                    put_weight(plan, places[id(dense)], parts, self.settings.engine)
            return

        def make_parts(plan: SparsePlan, dense: Tensor) -> Parts:
            stored = self.stored[plan.name]
            reader.check_mask(stored)
            return read_parts(stored, reader)

        method = method_of(self.manifest.config.method)
        install(model, plans, make_parts, method, self.settings.on_fallback, ExitStack())

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        """Finish the model: the kinds of its parameters, its record, and its compiled call.

        Raises:
            UnsupportedError: parameters stay on the disk.
        """
        self.remove_quantization_config(model)  # it behaves as after slope_fx.load_pretrained
        manifest, plans = self.manifest, tuple(own for own, _ in self.plans)
        _share(model, manifest)
        self._settle(model)
        graphs = {_here(model, path): number for path, number in manifest.graphs.items()}
        record = make_record(
            model, manifest.config, self.settings, plans, manifest.untraced_because, graphs
        )
        idle = {_here(model, name) for name in manifest.frozen}
        for name, parameter in model.named_parameters():
            if manifest.inference is not None or name in idle:
                parameter.requires_grad_(False)
        if manifest.inference is not None:
            attach_frozen(model, record, manifest.inference)
        else:
            attach(model, record, ExitStack())

    def _settle(self, model: nn.Module) -> None:
        """Finish the weights, which transformers filled with plain parameters."""
        plans = {own.name: own for own, _ in self.plans if isinstance(own, SparsePlan)}
        frozen = self.manifest.inference
        group = 0 if frozen is None else frozen.group
        weight: Any  # a SparseWeight or a FrozenWeight
        for weight, places in sparse_places(model).items():
            if weight.values.is_meta:
                raise UnsupportedError(_NO_DISK)
            forward = weight.forward_bits.data
            forward = forward.clone() if self.copies else forward
            if not isinstance(weight, FrozenWeight):
                backward = weight.backward_bits.data
                weight.forward_bits = Mask(forward)
                weight.backward_bits = Mask(backward.clone() if self.copies else backward)
                note_loaded(weight)
                continue
            adapter = None
            if weight.lora_A is not None and weight.lora_B is not None:
                adapter = weight.lora_A.data, weight.lora_B.data
            scales = None if weight.scales is None else weight.scales.data
            parts = FrozenParts(
                weight.values.data, forward, weight.dtype, adapter, scales,
                group,
            )  # fmt: skip
            with plain_modes():
                put_weight(plans[weight.name], places, parts, self.settings.engine)

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can train."""
        return True


_NO_DISK = (
    "a checkpoint of slope_fx can't stay on the disk (device_map): a sparse layer reads several "
    "tensors at each call. A frozen model on the CPU is mapped from its file, and needs no memory "
    "until it is used."
)


def register() -> None:
    """Register the quantizer with transformers, once."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(SlopeFxConfig)
        auto.register_quantizer(QUANT_METHOD)(SlopeFxQuantizer)


def _folder_of(model: Any, checkpoint_files: list[str]) -> Path:
    folder = Path(checkpoint_files[0]).parent
    if not (folder / MANIFEST).is_file() and not Path(model.config.name_or_path).is_dir():
        revision = getattr(model.config, "_commit_hash", None)
        cached_file(model.config.name_or_path, MANIFEST, revision=revision)  # beside the others
    return folder


def _plans_of(model: Any, manifest: Manifest) -> list[tuple[LinearPlan, LinearPlan]]:
    """The plans of the linears that ``model`` has, by its names and by the stored names.

    Raises:
        CheckpointError: a layer has another shape.
    """
    parameters = dict(model.named_parameters())
    found: list[tuple[LinearPlan, LinearPlan]] = []
    for plan in manifest.plans:
        own = dataclasses.replace(
            plan,
            name=_here(model, plan.name),
            parameter_name=_here(model, plan.parameter_name),
            scopes=tuple(_here(model, scope) for scope in plan.scopes),
        )
        parameter = parameters.get(own.parameter_name)
        if parameter is None:
            continue  # as the head, of a model without one
        if isinstance(own, SparsePlan) and tuple(parameter.shape) != own.layout.shape:
            raise CheckpointError(
                f"the checkpoint holds {own.parameter_name} of shape {own.layout.shape}; the model "
                f"has shape {tuple(parameter.shape)}. Open it with the config.json beside it."
            )
        found.append((own, plan))
    if sparse_plans(manifest.plans) and not any(isinstance(own, SparsePlan) for own, _ in found):
        raise CheckpointError(
            f"the checkpoint holds a {manifest.model_class}, and a {type(model).__name__} has none "
            "of its sparse layers."
        )
    return found


def _mark_loaded(model: Any, manifest: Manifest) -> None:
    """Mark the modules that need no initialization.

    Without the mark, transformers reads the dense weight of each sparse layer, and drops it.
    """
    stored = {_here(model, name) for name in (*manifest.tensors, *manifest.aliases)}
    others = [name for name in model.state_dict() if name not in stored]
    others += [name for name, _ in model.named_non_persistent_buffers()]
    owners = {name[:end] for name in others for end, letter in enumerate(name) if letter == "."}
    for path, module in model.named_modules():
        if path and path not in owners:
            module._is_hf_initialized = True


def _here(model: Any, name: str) -> str:
    """A stored name in ``model``, which may have the prefix of a base model or not."""
    prefix = f"{model.base_model_prefix}."
    own = {path for path, _ in model.named_children()}
    if name.partition(".")[0] in own:
        return name
    if name.startswith(prefix):
        return name.removeprefix(prefix)
    return prefix + name if model.base_model_prefix in own and name else name


def _share(model: nn.Module, manifest: Manifest) -> None:
    """Share the parameters that were shared. transformers knows those of dense layers alone."""
    for other, name in manifest.aliases.items():
        try:
            parameter = model.get_parameter(_here(model, name))
            path, _, attribute = _here(model, other).rpartition(".")
            model.get_submodule(path)._parameters[attribute] = parameter
        except AttributeError:
            continue  # a part that this model does not have
