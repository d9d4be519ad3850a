"""``compile``: a dense model in, the same model with N:M weights out."""

import gc
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from slope_fx import ops
from slope_fx.planning.activations import Activations, Calibration, needs_calibration, observe
from slope_fx.planning.adapters import AdapterInit, check_adapter_init, make_adapter
from slope_fx.backend import backend_of, compiled_call
from slope_fx.errors import (
    StateError,
    ArgumentError,
    ArgumentWarning,
    NoEligibleLinearError,
)
from slope_fx.sparse.install import install, restore, set_kind, warn_of_stale_optimizers
from slope_fx.kernels.engines import AUTO, forget_operands
from slope_fx.kernels.packing import unpack
from slope_fx.sparse.optimizers import watch
from slope_fx.planning.patterns import Pattern, PatternRules
from slope_fx.planning.plan import (
    AdapterRank,
    LinearPlan,
    MaskChoice,
    Skips,
    check_adapter_rank,
    check_mask_choice,
    choose_mask,
    layer_rank,
    plan_linears,
)
from slope_fx.planning.regions import Region, Regions, choose_regions, in_blocks
from slope_fx.backend.settings import BackendFunction, Settings, make_settings
from slope_fx.planning.trace import ExampleInputs, trace
from slope_fx.sparse.weight import OnFallback, Parts, SparseWeight

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
_RECORD = "_slope_fx"
_WRAPPERS = (DataParallel, DistributedDataParallel)


@dataclass(frozen=True)
class Compilation:
    """What ``compile`` decided, kept on the model.

    Attributes:
        plans: the fate of each linear.
        untraced_because: why the model's graph could not be had; "" if it was.
        settings: of the backend that compiles the graphs; None if nothing does.
        options: of torch.compile: ``dynamic`` and ``fullgraph``.
        region: as it was asked for.
        regions: the modules that are compiled.
        graphs: for each module of the traced model the number of its graph.
        adapter_init: what the adapters started from: one of its choices, or "callable".
    """

    plans: tuple[LinearPlan, ...]
    untraced_because: str
    settings: Settings | None
    options: tuple[tuple[str, bool | None], ...]
    region: Region
    regions: Regions
    graphs: Mapping[str, int]
    adapter_init: str = "zero"


@dataclass(frozen=True)
class CompileOptions:
    """How a model is compiled, as ``compile`` and ``load_pretrained`` take it."""

    backend: str | BackendFunction | None
    mode: str | None
    options: Mapping[str, Any] | None
    dynamic: bool | None
    fullgraph: bool
    region: Region
    engine: str
    passes: Sequence[Any]
    disable_passes: Sequence[str]
    enable_passes: Sequence[str]
    on_fallback: OnFallback

    def settings(self) -> Settings | None:
        """The backend's settings, checked; None if there is no backend.

        Raises:
            ArgumentError: one of them is not one of its allowed values.
        """
        check_choice("region", self.region, get_args(Region))
        check_choice("on_fallback", self.on_fallback, get_args(OnFallback))
        check_choice("dynamic", self.dynamic, (True, False, None))
        check_choice("fullgraph", self.fullgraph, (True, False))
        settings = make_settings(
            "eager" if self.backend is None else self.backend, self.engine, self.mode,
            self.options, self.passes, self.disable_passes, self.enable_passes,
        )  # fmt: skip
        if self.backend is not None:
            return settings
        _say_without_backend(
            engine=(self.engine, AUTO), mode=(self.mode, None), options=(self.options, None),
            dynamic=(self.dynamic, None), fullgraph=(self.fullgraph, False),
            passes=(list(self.passes), []), disable_passes=(list(self.disable_passes), []),
            enable_passes=(list(self.enable_passes), []),
        )  # fmt: skip
        return None


def compile(
    model: Model,
    sparsity: str | Pattern | Mapping[str, str | Pattern | None] = "2:4",
    *,
    adapter_rank: AdapterRank = None,
    adapter_init: AdapterInit = "zero",
    mask: MaskChoice = "magnitude",
    calibration: Calibration = None,
    skip_first: bool = True,
    skip_head: bool = True,
    skip_router: bool = True,
    example_inputs: ExampleInputs = None,
    backend: str | BackendFunction | None = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    region: Region = "auto",
    engine: str = AUTO,
    passes: Sequence[Any] = (),
    disable_passes: Sequence[str] = (),
    enable_passes: Sequence[str] = (),
    on_fallback: OnFallback = "warn",
) -> Model:
    """Make ``model`` train with SLoPe: N:M weights, double-pruned gradients, lazy adapters.

    The model is changed in place and returned. Each eligible linear weight is replaced
    by its kept values, a plain parameter ``weight_values`` of shape (d_out, d_in * N / M),
    so make the optimizer afterwards. Source: SLoPe (ICLR 2025), arXiv 2405.16325.

    Args:
        model: any module; fp32, bf16 or fp16 weights.
        sparsity: an N:M pattern with M in 2, 4, 8, 16; or a mapping from ``fnmatch``
            patterns on the layer's qualified name to one, where the first match wins
            and None keeps a layer dense.
        adapter_rank: rank of the low-rank adapters, or a float in (0, 1) as a fraction
            of each layer's input width; None for none. They take part once a
            :class:`~slope_fx.Schedule` reaches their phase.
        adapter_init: "zero" for adapters that add nothing until they train; to start from a
            pretrained model, "svd" for the nearest to what is pruned, or "eora" for the nearest
            in what that adds to the outputs over the calibration inputs (EoRA, arXiv
            2410.21271); or a callable (name, weight, mask, rank) -> (A, B), of shapes (r, d_in)
            and (d_out, r), whose product B A is added. All but "zero" take part from the start.
        mask: "magnitude"; "wanda" for magnitude times the norm of the input over the calibration
            inputs (arXiv 2306.11695); "random"; or a callable (name, weight) -> bool mask, with
            weight and mask of shape (d_out, d_in) and exactly N of each M kept in a row.
        calibration: a few batches of inputs for "wanda" and "eora", each as ``example_inputs``.
            The dense model runs on them, evaluated; "eora" needs d_in * d_in floats a layer.
        skip_first: leave dense the linears that the embeddings (or the input) feed.
        skip_head: leave dense the linear that makes the output.
        skip_router: leave dense the linears whose outputs are ranked to choose something, as the
            router of a mixture chooses experts. They are small and decide much.
        example_inputs: what to trace the model with: a tensor, a sequence of arguments,
            a mapping of keyword arguments, or (arguments, keyword arguments). A
            transformers model brings its own.
        backend: what compiles the rewritten graph, any torch.compile backend; None
            leaves compiling to you (see :func:`~slope_fx.rewriting_backend`).
        mode, options, dynamic, fullgraph: as of ``torch.compile``.
        region: "model" compiles one graph; "blocks" the repeated blocks one by one, which takes
            little more than a third of the time; what is outside of them and has no sparse
            linear stays eager. "auto" takes the blocks if the model has any that repeat. A model
            of transformers is then called with ``use_cache=False`` while it trains, unless you
            say otherwise, and compiled as a whole where a cache of keys and values is used.
        engine: what computes the sparse products. "auto" measures the engines on each
            kind of product that it meets and takes the fastest; a name ("cpu", "cpu-dense",
            "dense", "reference") fixes it, so that a run doesn't depend on timings; several,
            with commas, limit the choice. Overrides the environment's ``SLOPE_FX_ENGINES``.
        passes: your own passes over each graph, functions of a ``torch.fx.GraphModule`` that
            change it in place, or return another. They run after slope_fx's; to run some before,
            write ``...`` where slope_fx's are: ``[mine_before, ..., mine_after]``.
        disable_passes: names of slope_fx's passes to leave out, to find which one is at fault
            (see also :func:`slope_fx.debug.first_difference`).
        enable_passes: names of those to run that are off by default, for they were measured to
            gain nothing (docs/passes.md).
        on_fallback: what to do when a sparse layer trains with its dense weight rebuilt
            because no pass saw its linear: "warn" once a layer, "error", "ignore". It shows
            when a gradient arrives there, so that is when it is told.

    Returns:
        ``model`` itself.

    Raises:
        SlopeError: one of its subclasses for each mistake; the model is then as it was.
    """
    rules = PatternRules(sparsity)
    adapter_rank = check_adapter_rank(adapter_rank)
    check_mask_choice(mask)
    check_choice("skip_first", skip_first, (True, False))
    check_choice("skip_head", skip_head, (True, False))
    check_choice("skip_router", skip_router, (True, False))
    check_adapter_init(adapter_init, adapter_rank)
    check_model(model)
    needed_for = needs_calibration(mask, adapter_init)
    if needed_for and calibration is None:
        raise ArgumentError(
            f"{needed_for} needs calibration=, a few batches of inputs such as [ids, ids]."
        )
    how = CompileOptions(
        backend, mode, options, dynamic, fullgraph, region, engine, passes, disable_passes,
        enable_passes, on_fallback,
    )  # fmt: skip
    settings = how.settings()

    traced = trace(model, example_inputs)
    skips = Skips(skip_first, skip_head, skip_router)
    plans = plan_linears(model, traced, rules, skips)
    sparse_plans = [plan for plan in plans if plan.pattern is not None]
    if not sparse_plans:
        raise NoEligibleLinearError(_nothing_to_do(plans, traced.untraced_because))
    parameters = dict(model.named_parameters())
    ranks = {plan.name: layer_rank(adapter_rank, plan) for plan in sparse_plans}
    observed: dict[str, Activations] = {}
    if needed_for:
        observed = observe(model, sparse_plans, calibration, grams=adapter_init == "eora")
    masks = {}
    for plan in sparse_plans:
        weight = parameters[plan.parameter_name].detach()
        assert plan.pattern is not None
        assert plan.layout is not None
        weight = plan.layout.to_matrix(weight).contiguous().view(plan.shape)
        seen = observed.get(plan.name)
        squares = None if seen is None else seen.squares.view(*plan.shape[:-2], plan.shape[-1])
        masks[plan.name] = choose_mask(mask, plan.name, weight, plan.pattern, squares)

    def make_parts(plan: LinearPlan, dense: Tensor) -> Parts:
        assert plan.layout is not None
        assert plan.pattern is not None
        n, m, bits, rank = plan.pattern.n, plan.pattern.m, masks[plan.name], ranks[plan.name]
        matrix = plan.layout.to_matrix(dense).contiguous()
        values = ops.compress(matrix, bits, n, m)
        if rank is None:
            return Parts(values, bits)
        adapter = make_adapter(
            adapter_init, plan.name, matrix.view(plan.shape),
            unpack(bits, plan.shape[-1]).view(plan.shape), rank, observed.get(plan.name),
        )  # fmt: skip
        return Parts(
            values, bits, None, adapter.lora_A, adapter.lora_B, adapter.scale, adapter.active
        )

    begun = adapter_init if isinstance(adapter_init, str) else "callable"
    record = make_record(model, plans, traced.untraced_because, traced.graphs, how, settings, begun)
    # Whatever mode the caller is in, the parameters are to train, and to be as they are computed.
    plain = torch.inference_mode(False), _without_autocast()
    with ExitStack() as undo, plain[0], plain[1]:
        replaced = install(model, sparse_plans, make_parts, on_fallback, undo)
        attach(model, record, undo)
        undo.pop_all()  # nothing can fail any more
    _say_what_was_ignored(rules, traced.untraced_because, given=example_inputs is not None)
    if calibration is not None and not needed_for:
        warnings.warn(
            'calibration has no effect: only mask="wanda" and adapter_init="eora" use it.',
            ArgumentWarning,
            stacklevel=2,
        )
    warn_of_stale_optimizers(replaced)
    log.info("%d of %d linears are sparse", len(sparse_plans), len(plans))
    return model


def make_record(
    model: nn.Module,
    plans: Sequence[LinearPlan],
    untraced_because: str,
    graphs: Mapping[str, int],
    how: CompileOptions,
    settings: Settings | None,
    adapter_init: str,
) -> Compilation:
    """What is kept on a model, of which nothing is changed here."""
    return Compilation(
        tuple(plans),
        untraced_because,
        settings,
        (("dynamic", how.dynamic), ("fullgraph", how.fullgraph)),
        how.region,
        Regions() if settings is None else choose_regions(model, how.region, plans, graphs),
        _of_interest(graphs, plans),
        adapter_init,
    )


def _of_interest(graphs: Mapping[str, int], plans: Sequence[LinearPlan]) -> dict[str, int]:
    """The graphs of the modules that hold a linear: what regions are chosen from."""
    scopes = {scope for plan in plans for scope in plan.scopes}
    holding = {scope[:end] for scope in scopes for end in _ends(scope)}
    return {path: number for path, number in graphs.items() if path in holding}


def _ends(path: str) -> list[int]:
    return [i for i, letter in enumerate(path) if letter == "."] + [len(path)]


def attach(model: nn.Module, record: Compilation, undo: ExitStack) -> None:
    """Make ``model``, whose weights are installed, one that carries ``record`` and is compiled."""
    watch()
    undo.callback(restore, model, type(model), dict(model.__dict__))
    model.__dict__[_RECORD] = record
    set_kind(model, after_copy=_compile_regions)
    _compile_regions(model)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach` on a model whose weights are dense again."""
    record: Compilation = model.__dict__.pop(_RECORD)
    for path in {"", *record.regions.paths}:
        model.get_submodule(path)._compiled_call_impl = None


def compilation_of(model: nn.Module) -> Compilation:
    """What ``compile`` decided for ``model``.

    Raises:
        StateError: ``compile`` has not been called on it.
    """
    record = getattr(model, "__dict__", {}).get(_RECORD)
    if not isinstance(record, Compilation):
        raise StateError(
            f"model is a {type(model).__name__} that slope_fx.compile has not been called on. "
            "Pass the object that compile returned, not a part or a wrapper of it."
        )
    return record


def compiled_models(module: nn.Module) -> list[nn.Module]:
    """The compiled models in ``module``, itself included."""
    return [m for m in module.modules() if isinstance(m.__dict__.get(_RECORD), Compilation)]


def sparsity_of(module: nn.Module) -> float:
    """The fraction of the weights of all linears of its compiled models that is zero."""
    plans = [plan for model in compiled_models(module) for plan in compilation_of(model).plans]
    sizes = [(math.prod(p.shape), p.pattern.density if p.pattern else 1.0) for p in plans]
    return 1 - sum(size * kept for size, kept in sizes) / sum(size for size, _ in sizes)


def sparse_weights_of(model: nn.Module) -> dict[str, SparseWeight]:
    """The sparse weights of ``model`` and its parts, by the layer's name; empty if none."""
    return {m.name: m for m in model.modules() if isinstance(m, SparseWeight)}


def sparse_weights(model: nn.Module) -> dict[str, SparseWeight]:
    """The sparse weights of a compiled model, by the layer's qualified name.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
    """
    compilation_of(model)
    return sparse_weights_of(model)


def weights_changed(model: nn.Module) -> None:
    """Tell that weights were written to in a way that PyTorch doesn't count.

    An engine may keep what it made of a weight until that changes, which it sees by the parameter's
    version or an optimizer's step. Needed after other writes, with ``SLOPE_FX_KEEP_OPERANDS=1`` or
    between two micro-batches of one optimizer step: to ``.data``, by ``torch.distributed``'s
    collectives into a parameter, by kernels and libraries that are given its address. Elsewhere
    it does no harm.

    Raises:
        StateError: ``model`` is not the object that ``compile`` returned.
    """
    for weight in sparse_weights(model).values():
        forget_operands(weight.values)


def _compile_regions(model: nn.Module) -> None:
    record: Compilation = model.__dict__[_RECORD]
    if record.settings is None:
        return
    backend = backend_of(record.settings)
    options: dict[str, Any] = dict(record.options)
    regions = record.regions
    for path, kind in zip(regions.paths, regions.kinds, strict=True):
        module = model.get_submodule(path)
        module._compiled_call_impl = compiled_call(
            module, backend, kind=(record.plans, kind), kinds=len(set(regions.kinds)), **options
        )
    if record.region == "auto" and not regions.whole:
        whole = compiled_call(model, backend, **options)
        model._compiled_call_impl = in_blocks(model, whole)


def check_model(model: nn.Module) -> None:
    """Raise unless ``model`` is one that can be compiled, and isn't compiled or wrapped yet."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; it must be a torch.nn.Module.")
    if any(c.__name__ == "LightningModule" for c in type(model).__mro__):
        raise ArgumentError(
            "model is a LightningModule, whose training_step Lightning calls past any compiled "
            "forward. Compile the model in it: self.model = slope_fx.compile(self.model, ...)."
        )
    already = list(sparse_weights_of(model))
    if already:
        raise StateError(
            f"model is compiled already: {already[0]} holds a sparse weight, and {len(already)} "
            "layers in all. Compile a fresh dense model, or keep using this one."
        )
    modules = list(model.modules())
    wrappers = [thing for thing in gc.get_objects() if issubclass(type(thing), _WRAPPERS)]
    for wrapper in wrappers:
        inner = getattr(wrapper, "module", None)
        if any(module is wrapper or module is inner for module in modules):
            raise ArgumentError(
                f"model is wrapped in {type(wrapper).__name__}, which goes on synchronising the "
                "parameters that compile replaces. Call slope_fx.compile first, then wrap."
            )
    for name, module in model.named_modules():
        if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
            raise ArgumentError(
                f"{name or 'model'} is compiled by torch.compile already, with a backend that "
                "knows no sparse weights. Pass the model as it was before: slope_fx.compile "
                "compiles it, with backend= and region= to say how."
            )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ArgumentError(
                f"{name} is not initialised yet. Run a lazy module once before compile."
            )
        if parameter.is_meta:
            raise ArgumentError(
                f"{name} is on the meta device and has no values to choose a mask from. Give the "
                "model storage first, with model.to_empty(device=...) and an initialisation."
            )


def _without_autocast() -> ExitStack:
    off = ExitStack()
    for device in {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}:
        off.enter_context(torch.autocast(device, enabled=False))
    return off


def _say_without_backend(**arguments: tuple[object, object]) -> None:
    """Warn of arguments that only a backend would look at."""
    for name, (value, default) in arguments.items():
        if value != default:
            warnings.warn(
                f"{name}={value!r} has no effect with backend=None; give it to rewriting_backend "
                "or to torch.compile.",
                ArgumentWarning,
                stacklevel=3,
            )


def check_choice(argument: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ArgumentError(f"{argument}={value!r}; allowed are {', '.join(map(repr, allowed))}.")


def _nothing_to_do(plans: list[LinearPlan], untraced_because: str) -> str:
    if not plans:
        found = "No linear was found in the model."
    else:
        found = "No linear of the model can be sparse: " + "; ".join(
            f"{plan.name or '(the model)'}: {plan.reason}" for plan in plans
        )
    how = f" The model was not traced ({untraced_because})." if untraced_because else ""
    return (
        f"{found}.{how} See skip_first, skip_head, skip_router and sparsity for what they leave "
        "dense."
    )


def _say_what_was_ignored(rules: PatternRules, untraced_because: str, *, given: bool) -> None:
    if untraced_because:
        advice = (
            "Its forward runs on the example_inputs, but torch.export can't follow it: see "
            'TORCH_LOGS="+slope_fx" for where.'
            if given
            else "Pass example_inputs that the model's forward accepts to have its graph decide."
        )
        warnings.warn(
            f"The model was not traced ({untraced_because}); its nn.Linear and Conv1D modules "
            "were taken instead, the first for the one that reads the input and the last for the "
            f"output head. {advice}",
            ArgumentWarning,
            stacklevel=3,
        )
    for key in rules.unmatched():
        warnings.warn(
            f"sparsity[{key!r}] matches no linear of the model that an earlier key doesn't "
            "match; see slope_fx.explain(model) for the names.",
            ArgumentWarning,
            stacklevel=3,
        )
