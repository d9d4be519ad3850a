"""``compile``: prunes the weights of a dense model and compiles the model."""

import logging
from contextlib import ExitStack
from typing import TypeVar

from torch import Tensor, nn
from typing_extensions import Unpack

from slope_fx.attach import attach, make_record
from slope_fx.checks import (
    CompileOptions,
    check_meta,
    check_model,
    check_sharded,
    say_untraced,
    say_what_was_ignored,
    split_options,
)
from slope_fx.errors import ArgumentError, NoEligibleLinearError
from slope_fx.kernels.packing import unpack
from slope_fx.methods import Dense, method_of
from slope_fx.planning.activations import Activations
from slope_fx.planning.adapters import make_adapter
from slope_fx.planning.calibration import Calibration, observe
from slope_fx.planning.config import SlopeConfig, Sparsity
from slope_fx.planning.masks import choose_mask
from slope_fx.planning.patterns import PatternRules
from slope_fx.planning.plan import (
    SparsePlan,
    layer_rank,
    left_dense,
    nothing_to_do,
    plan_linears,
    sparse_plans,
)
from slope_fx.planning.trace import ExampleInputs, trace
from slope_fx.sparse.blank import Start
from slope_fx.sparse.install import install
from slope_fx.sparse.optimizers import watch
from slope_fx.sparse.parts import Parts
from slope_fx.sparse.sharded_first import as_before

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def compile(
    model: Model,
    sparsity: Sparsity | SlopeConfig = "2:4",
    *,
    example_inputs: ExampleInputs = None,
    calibration: Calibration = None,
    **options: Unpack[CompileOptions],
) -> Model:
    """Prune and compile ``model`` for training with SLoPe.

    The compiled model has N:M weights, double-pruned gradients and lazy adapters. The model is
    changed in place and returned. Each eligible linear weight is replaced by its kept values, a
    plain parameter ``weight_values`` of shape (d_out, d_in * N / M), so make the optimizer after
    ``compile``. Source: SLoPe (ICLR 2025), arXiv 2405.16325.

    A model on the meta device is compiled without weights. Masks and adapters are then chosen when
    the model's own initialization writes the weights: after ``model.to_empty(device=...)``, run
    ``model.init_weights()`` or ``reset_parameters()`` as for a dense model, before or after
    ``fully_shard``. Random masks and adapters depend on the seed of ``torch.manual_seed`` and on
    the name of the layer, so they are those of a model that was compiled with its weights.

    A model that ``fully_shard`` sharded is compiled by all ranks together. Each layer is gathered
    in turn, to choose its masks, and its parts are sharded by rows.

    Args:
        model: any module with fp32, bf16 or fp16 weights, or on the meta device.
        sparsity: an N:M pattern, a mapping from layer names to N:M patterns, as
            :attr:`SlopeConfig.sparsity`, or a :class:`SlopeConfig`.
        example_inputs: inputs for the trace of the model: a tensor, a sequence of arguments, a
            mapping of keyword arguments, or (arguments, keyword arguments). A transformers model
            does not need them.
        calibration: batches of inputs for ``mask="wanda"`` and ``adapter_init="eora"``, each in a
            form of ``example_inputs``. The dense model runs on them in evaluation mode. "eora"
            needs d_in * d_in fp32 numbers per layer.
        options: fields of :class:`SlopeConfig`, which configure the pruning: ``mask``,
            ``adapter_rank``, ``adapter_init``, ``skip_first``, ``skip_head``, ``skip_router``,
            ``method``. Fields of :class:`~slope_fx.backend.Settings`, which configure the run:
            ``backend``, ``mode``, ``options``, ``dynamic``, ``fullgraph``, ``region``, ``engine``,
            ``passes``, ``disable_passes``, ``on_fallback``.

    Returns:
        ``model``.

    Raises:
        SlopeError: an argument or the model is not supported. Each kind of mistake has a subclass.
            The model is then unchanged.
    """
    config, settings = split_options(sparsity, options)
    check_model(model)
    check_sharded(model, config)
    if config.needs_calibration and calibration is None:
        raise ArgumentError(
            f"{config.needs_calibration} needs calibration=, a few batches of inputs such as "
            "[ids, ids]."
        )
    method = method_of(config.method)
    rules = PatternRules(config.sparsity)
    with as_before(model):
        traced = trace(model, example_inputs)
        plans = plan_linears(model, traced, config, rules)
    if isinstance(method, Dense):
        plans = [left_dense(plan, 'method="dense"') for plan in plans]
    sparse = sparse_plans(plans)
    if not sparse and not isinstance(method, Dense):
        raise NoEligibleLinearError(nothing_to_do(plans, traced.untraced_because))
    check_meta(model, sparse, config)
    ranks = {plan.name: layer_rank(config, plan) for plan in sparse}
    inputs: dict[str, Activations] = {}
    if config.needs_calibration:
        inputs = observe(model, sparse, calibration, grams=config.adapter_init == "eora")

    def make_parts(plan: SparsePlan, dense: Tensor) -> Parts:
        weight, seen, rank = _matrices(plan, dense), inputs.get(plan.name), ranks[plan.name]
        chosen = choose_mask(config.mask, plan.name, weight, plan.pattern, seen)
        weight = weight if chosen.weight is None else chosen.weight
        matrix = weight.view(-1, plan.shape[-1])
        kept = method.keep(matrix, chosen.bits, plan.pattern)
        factor = method.factor(matrix, chosen.bits, plan.pattern)
        start = Start(str(config.mask)) if dense.is_meta else None
        if rank is None:
            return Parts(kept, chosen.bits, start=start, factor=factor)
        mask = None
        if config.adapter_init != "zero":
            mask = unpack(chosen.bits, plan.shape[-1]).view(plan.shape)
        adapter = make_adapter(config.adapter_init, plan.name, weight, mask, rank, seen)
        return Parts(kept, chosen.bits, adapter=adapter, start=start, factor=factor)

    record = make_record(model, config, settings, plans, traced.untraced_because, traced.graphs)
    with ExitStack() as undo:
        replaced = install(model, sparse, make_parts, method, settings.on_fallback, undo)
        attach(model, record, undo)
        undo.pop_all()  # nothing can fail any more
    watch(replaced)
    say_untraced(traced.untraced_because, given=example_inputs is not None)
    say_what_was_ignored(settings, config, rules, calibration is not None and not inputs)
    log.info("%d of %d linears are sparse", len(sparse), len(plans))
    return model


def _matrices(plan: SparsePlan, dense: Tensor) -> Tensor:
    """A weight as a contiguous (d_out, d_in) or (stack, d_out, d_in) tensor, without autograd."""
    return plan.layout.to_matrix(dense.detach()).contiguous().view(plan.shape)
