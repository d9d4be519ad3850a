"""A model converter and learning-rate schedulers for torchtitan."""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.quantization.utils import has_quantization
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module
from torchtitan.trainer import Trainer

from slope_fx.compiler import compile
from slope_fx.errors import ArgumentError, UnsupportedError
from slope_fx.planning.plan import sparse_name, values_name
from slope_fx.record import sparse_weights, sparsity_of
from slope_fx.schedule import Schedule
from slope_fx.sparse.weight import SparseWeight

if not hasattr(dist, "set_timeout"):
    # torchtitan 0.3 calls it after the first step. Releases of PyTorch up to 2.13 have it so:
    dist.set_timeout = dist.distributed_c10d._set_pg_timeout  # type: ignore[attr-defined]


class SlopeConverter(ModelConfigConverter):  # type: ignore[misc]
    """Makes a torchtitan model sparse: ``model_registry("8B", converters=[...])``.

    The model is built as torchtitan builds it, and then :func:`slope_fx.compile` is called on it,
    before torchtitan applies activation checkpointing and FSDP2. The forward masks are chosen from
    the initial weights.

    The config of a run needs :class:`SlopeSchedulers` as ``lr_scheduler``, and these options of
    torchtitan: ``training.disable_cuda_graphs``, ``parallelism.spmd_backend="partial_dtensor"``,
    and no ``compile.enable`` for the model, because slope_fx compiles it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):  # type: ignore[misc]
        """The arguments of :func:`slope_fx.compile`.

        Attributes:
            sparsity: as for :func:`slope_fx.compile`.
            options: keyword arguments of :func:`slope_fx.compile`, such as ``adapter_rank``.
        """

        sparsity: Any = "2:4"
        options: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config) -> None:
        self.config = config

    def convert(self, model_config: Module.Config) -> Module.Config:
        """Returns a config that builds the sparse model. ``model_config`` is not changed.

        Raises:
            UnsupportedError: the model is not a decoder, or has quantized layers or experts.
        """
        if not isinstance(model_config, Decoder.Config):
            raise UnsupportedError(
                f"SlopeConverter: {type(model_config).__qualname__} is not a Decoder.Config, as "
                "those of llama3 and qwen3 are. Other models are not supported."
            )
        if any(getattr(layer, "moe", None) is not None for layer in model_config.layers):
            raise UnsupportedError(
                f"SlopeConverter: {type(model_config).__qualname__} has mixtures of experts, whose "
                "routers can't be traced on the meta device, where torchtitan builds them."
            )
        if has_quantization(model_config):
            raise UnsupportedError(
                "SlopeConverter: the model has quantized linears, which can't be made sparse. Use "
                "one converter or the other."
            )
        values = {f.name: getattr(model_config, f.name) for f in dataclasses.fields(model_config)}
        sparse = _sparse_config(type(model_config))  # type: ignore[arg-type]
        made: Module.Config = sparse(**values, slope=self.config)
        return made


class SlopeSchedulers(LRSchedulersContainer):  # type: ignore[misc]
    """torchtitan's learning-rate schedulers, with a :class:`slope_fx.Schedule` beside them.

    The trainer steps it after each optimizer step, and saves it in its checkpoints. It adds
    ``slope/adapter_phase`` (0 or 1) and ``slope/sparsity`` (the fraction of zeros in all linear
    weights) to the logged metrics.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):  # type: ignore[misc]
        """The options of torchtitan's ``LRSchedulersContainer.Config``, and these.

        Attributes:
            adapter_start, backward_mask_interval: as for :class:`slope_fx.Schedule`. The number of
                steps is ``training.steps``.
        """

        adapter_start: float | None = None
        backward_mask_interval: int | None = 100

        def build(
            self, *, optimizers: OptimizersContainer, training_steps: int
        ) -> "SlopeSchedulers":
            if len(optimizers.model_parts) != 1:
                raise UnsupportedError(
                    f"the model has {len(optimizers.model_parts)} parts on this rank, of pipeline "
                    "stages, and one Schedule steps one model. Use "
                    "--parallelism.pipeline_parallel_degree 1."
                )
            plain = LRSchedulersContainer.Config.build(
                self, optimizers=optimizers, training_steps=training_steps
            )
            (model,) = optimizers.model_parts
            schedule = Schedule(
                model, training_steps, self.adapter_start, self.backward_mask_interval
            )
            return SlopeSchedulers(plain, optimizers, model, schedule)

    def __init__(
        self,
        plain: LRSchedulersContainer,
        optimizers: OptimizersContainer,
        model: nn.Module,
        schedule: Schedule,
    ) -> None:
        self.schedulers = plain.schedulers
        self.schedule = schedule
        self._sparsity = sparsity_of(model)
        for optimizer in optimizers:
            optimizer.register_state_dict_pre_hook(functools.partial(_fill_states, model))

    def step(self) -> None:
        """Step the learning rates and the Schedule."""
        super().step()
        self.schedule.step()

    def get_metrics(self) -> dict[str, float]:
        """The learning rates, the phase and the sparsity."""
        return {
            **super().get_metrics(),
            "slope/adapter_phase": float(self.schedule.phase == "adapter"),
            "slope/sparsity": self._sparsity,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state for the trainer's checkpoint."""
        return {**super().state_dict(), "slope": self.schedule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the learning rates and the phase."""
        super().load_state_dict(state_dict)
        self.schedule.load_state_dict(state_dict["slope"])


def _fill_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the idle adapters the state that they will start from, before a state dict is made.

    torchtitan loads a checkpoint into the state that each parameter has. At that time the phase of
    the checkpoint is not known yet, so the adapters must have a state in both phases.
    """
    adapters = {
        id(factor)
        for weight in sparse_weights(model).values()
        for factor in (weight.lora_A, weight.lora_B)
    }
    for group in optimizer.param_groups:
        known = [state for p in group["params"] if (state := optimizer.state.get(p))]
        for parameter in group["params"]:
            if known and id(parameter) in adapters and not optimizer.state.get(parameter):
                optimizer.state[parameter] = {
                    name: _blank_like(value, parameter) for name, value in known[0].items()
                }


def _blank_like(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return type(value)()
    if value.dim() == 0:
        return torch.zeros_like(value)
    return torch.zeros_like(parameter, dtype=value.dtype)


@functools.cache
def _sparse_config(base: Any) -> Any:
    """The config class of the sparse model, for a config class of a dense model."""

    @dataclass(kw_only=True, slots=True)
    class SparseConfig(base):  # type: ignore[misc]
        _owner: ClassVar[type | None] = base._owner
        slope: SlopeConverter.Config

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            _check_run(config)
            base.update_from_config(self, config=config, **kwargs)

        def build(self, **kwargs: Any) -> Decoder:
            return _build(base, self)

    SparseConfig.__name__ = f"Sparse{base.__name__}"
    SparseConfig.__qualname__ = f"Sparse{base.__qualname__}"
    return SparseConfig


def _check_run(config: Any) -> None:
    """Refuse options of the run that a sparse model can't train with.

    Raises:
        ArgumentError: an option has a value that slope_fx needs another value of.
        UnsupportedError: an option is not supported.
    """
    if not isinstance(config, Trainer.Config):
        return
    training, parallelism, checkpoint = config.training, config.parallelism, config.checkpoint
    if not isinstance(config.lr_scheduler, SlopeSchedulers.Config):
        raise ArgumentError(
            f"lr_scheduler is a {type(config.lr_scheduler).__qualname__}, which doesn't refresh "
            "the backward masks or start the adapters. Use "
            "slope_fx.integrations.torchtitan.SlopeSchedulers.Config; it has the same options."
        )
    if getattr(config.compile, "mode", None) == "aot_fx_trace":
        raise UnsupportedError(
            "the graph trainer traces each step with make_fx, after autograd, where the passes of "
            "slope_fx have no linears to rewrite. Use the Trainer of torchtitan."
        )
    if config.compile.enable and "model" in config.compile.components:
        raise ArgumentError(
            'compile.components has "model", but slope_fx compiles the blocks of the model. Use '
            '--compile.components loss; options={"backend": ...} of SlopeConverter.Config says '
            "what compiles them."
        )
    if not training.disable_cuda_graphs:
        raise ArgumentError(
            "training.disable_cuda_graphs is False: a CUDA graph of a whole step would not see the "
            "start of the adapter phase. Use --training.disable_cuda_graphs."
        )
    if parallelism.spmd_backend != "partial_dtensor":
        raise UnsupportedError(
            f"parallelism.spmd_backend={parallelism.spmd_backend!r} needs a placement of each "
            "parameter, and torchtitan's tables have none of sparse weights. Use "
            "--parallelism.spmd_backend partial_dtensor."
        )
    for name in ("tensor_parallel_degree", "pipeline_parallel_degree", "context_parallel_degree"):
        if getattr(parallelism, name) > 1:
            raise UnsupportedError(
                f"parallelism.{name}={getattr(parallelism, name)} is not supported with sparse "
                "weights in torchtitan; data parallelism is (data_parallel_shard_degree, "
                "data_parallel_replicate_degree)."
            )
    for name in ("initial_load_in_hf", "last_save_in_hf"):
        if getattr(checkpoint, name):
            raise UnsupportedError(
                f"checkpoint.{name}: torchtitan's conversion to Hugging Face's format has no names "
                "for sparse weights. Convert a finished checkpoint with slope_fx.save_pretrained."
            )


def _build(base: type[Decoder.Config], config: Any) -> Decoder:
    """Build the dense model, on torchtitan's device for that, and make it sparse."""
    names = [f.name for f in dataclasses.fields(base) if f.init]
    model: Decoder = base(**{name: getattr(config, name) for name in names}).build()
    model.verify_module_protocol()
    device = next(model.parameters()).device
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=device)
    with _plain_attention(model):
        compile(model, config.slope.sparsity, example_inputs=tokens, **config.slope.options)
    _initialize_sparse(model)
    # What compile adds are plain modules. Those of torchtitan have been verified above.
    model.verify_module_protocol = types.MethodType(_verified, model)
    return model


def _verified(model: nn.Module) -> None:
    """Takes the place of a check that was done before the model was made sparse."""


@contextmanager
def _plain_attention(model: Decoder) -> Iterator[None]:
    """Replaces the attention by torch's while the model is traced.

    Its other kinds need masks that torchtitan makes of the data. They have no parameters.
    """
    with ExitStack() as undo:
        for module in list(model.modules()):
            inner = getattr(module, "inner_attention", None)
            if isinstance(inner, nn.Module):
                undo.callback(setattr, module, "inner_attention", inner)
                module.inner_attention = ScaledDotProductAttention.Config().build()
        yield


def _initialize_sparse(model: nn.Module) -> None:
    """Let torchtitan initialize the dense weight, from which slope_fx takes masks and values.

    torchtitan looks up the function that initializes a parameter by its name.

    Raises:
        UnsupportedError: a sparse layer has no such function.
    """
    for owner in model.modules():
        known = getattr(owner, "_param_init", None) or {}
        attributes = {
            name.removesuffix(sparse_name("")): part.name
            for name, part in owner.named_children()
            if isinstance(part, SparseWeight)
        }
        for attribute, layer in attributes.items():
            if attribute not in known:
                raise UnsupportedError(
                    f"{layer}: its config has no param_init[{attribute!r}], which a sparse weight "
                    "is initialized with. Set it, or keep the layer dense with "
                    "sparsity={...: None}."
                )
            of_values = functools.partial(_initialize, owner, attribute, known[attribute])
            known = {**known, values_name(attribute): of_values}
        if attributes:
            owner._param_init = known  # type: ignore[assignment]


def _initialize(
    owner: nn.Module, attribute: str, init: Callable[[Tensor], object], values: Tensor
) -> None:
    """Initialize the dense weight of a layer in place of its values."""
    init(getattr(owner, attribute))
