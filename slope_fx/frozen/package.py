"""``package``: an AOTInductor package of a frozen model, which runs without slope_fx."""

import functools
import inspect
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from slope_fx.errors import ArgumentError, ArgumentWarning, StateError, UnsupportedError, first_line
from slope_fx.hub import takes_cache
from slope_fx.kernels.cpu.build import BuildError, ops_library
from slope_fx.passes import run_passes
from slope_fx.planning.trace import ExampleInputs, split_inputs, transformers_inputs
from slope_fx.record import record_of

LIBRARY = "libslope_fx.so"
"""The name of the library of the ops, beside a package."""


@dataclass(frozen=True)
class Package:
    """What :func:`package` wrote.

    Attributes:
        path: the AOTInductor package.
        library: the library of the ops, which is loaded before the package.
        inputs: name of an input -> its dtype and shape. A name in a shape is a size that is free.
        outputs: dtypes and shapes of the outputs.
    """

    path: Path
    library: Path
    inputs: dict[str, str]
    outputs: list[str]

    def __str__(self) -> str:
        given = ", ".join(f"{name} {what}" for name, what in self.inputs.items())
        return f"{self.path}: {given} -> {', '.join(self.outputs)}; {self.library}"


def package(
    model: nn.Module,
    path: str | os.PathLike[str] = "model.pt2",
    *,
    example_inputs: ExampleInputs = None,
    dynamic: Any = True,
    cache: tuple[int, int] | None = None,
) -> Package:
    """Write a frozen model as an AOTInductor package, which runs without slope_fx.

    The folder of ``path`` also gets ``libslope_fx.so``: the products of the sparse weights, in C++.
    A Python process with nothing but PyTorch runs the package so, and ``examples/cpp`` shows a C++
    program::

        torch.ops.load_library("libslope_fx.so")
        model = torch._inductor.aoti_load_package("model.pt2")
        logits = model(input_ids=input_ids)

    A package is compiled for the CPU of this machine, and for the installed version of PyTorch.
    On a CPU that lacks some of its instructions, the library says so when it is loaded, and its
    ops raise an error. A package has no autograd and no autocast.

    A model with a mapping as output, as those of transformers, is packaged without its cache, and
    returns its ``logits``; without logits, a dictionary of its tensors.

    Args:
        model: a frozen model on the CPU, in evaluation mode. It does not change.
        path: the file, which ends in ".pt2". An existing file is replaced.
        example_inputs: inputs, as in :func:`slope_fx.compile`, with two or more in each dimension
            whose size is free. None: token ids or images for a transformers model.
        dynamic: which sizes are free. True: those of the first two dimensions of each input, as far
            as the model allows. False: none. Or ``dynamic_shapes`` of ``torch.export.export``.
        cache: batch and largest length, for a causal language model of transformers: the package
            has a static cache in it. Its inputs are ``input_ids`` (batch, tokens) and
            ``cache_position`` (tokens,), the positions of the tokens. Its output are the logits.
            A position that is written again replaces those from it on.

    Returns:
        What was written.

    Raises:
        StateError: the model is not frozen, or in training mode.
        ArgumentError: an argument has a value that is not allowed.
        UnsupportedError: the model is not on the CPU or can't be exported, or there is no
            C++ compiler.
    """
    target = Path(path)
    if target.suffix != ".pt2" or not target.parent.is_dir():
        raise ArgumentError(
            f"path is {os.fspath(path)!r}; it should be a file that ends in .pt2, in a folder that "
            "exists."
        )
    if not os.access(target.parent, os.W_OK):
        raise ArgumentError(f"path is {os.fspath(path)!r}; its folder can't be written.")
    library = _library_for(model)
    if cache is not None:
        if example_inputs is not None:
            raise ArgumentError("example_inputs can't be given with cache, which has its own.")
        module, args, kwargs, shapes = _with_cache(model, cache)
    else:
        module, (args, kwargs) = _Plain(model), _inputs(model, example_inputs)
        named = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        shapes = tree_map(_free, dict(named))
    if dynamic is not True:
        shapes = None if dynamic is False else dynamic
    # Only Dynamo sees that a cache is a buffer.
    program = _exported(module, args, kwargs, shapes, strict=cache is not None)
    with torch.no_grad():
        run_passes(program.graph_module)  # for code other than the forward of nn.Linear
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    given = {str(name): values[name] for name in program.graph_signature.user_inputs}
    made = {str(name): values[name] for name in program.graph_signature.user_outputs}
    if dynamic is True:
        _tell_fixed(given, 0 if cache is None else 1)
    with _replaced(target) as partial:
        _compile(program, partial)
        shutil.copyfile(library, partial.with_name(LIBRARY))
    described = _described({**given, **made})
    inputs = {name: described[name] for name in given}
    return Package(target, target.with_name(LIBRARY), inputs, [described[name] for name in made])


def _library_for(model: nn.Module) -> Path:
    """The library of the ops for a model that can be packaged."""
    if record_of(model).frozen is None:
        raise StateError(
            f"model is a {type(model).__name__} that isn't frozen, and its products need slope_fx. "
            "Call slope_fx.freeze(model) first; it changes the model. Or package a dense copy: "
            "slope_fx.densify(model)."
        )
    if model.training:
        raise StateError("model is in training mode. Call model.eval() first.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            raise UnsupportedError(
                f"{name} is on {tensor.device}. A package runs on a CPU: call model.cpu()."
            )
    try:
        return ops_library(define=True)
    except BuildError as error:
        raise UnsupportedError(f"the library of a package can't be built here: {error}") from None


class _Plain(nn.Module):
    """Calls a model without its cache, and takes the tensors of an output that is a mapping."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        more = {"use_cache": False} if takes_cache(model) else {}

        @functools.wraps(model.forward)  # torch.export reads the names of the arguments
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = model(*args, **{**more, **kwargs})
            if not isinstance(output, Mapping):
                return output
            if "logits" in output:
                return output["logits"]
            return {name: value for name, value in output.items() if isinstance(value, Tensor)}

        self.forward = forward


def _inputs(model: nn.Module, given: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = transformers_inputs(model, 2) if given is None else split_inputs(given)
    if inputs is None:
        raise ArgumentError(
            f"example_inputs are needed for a {type(model).__name__}: what you would call it with."
        )
    return inputs


def _with_cache(
    model: nn.Module, cache: tuple[int, int]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]:
    """A model with a static cache in it, its inputs, and their free sizes."""
    good = isinstance(cache, tuple) and len(cache) == 2
    if not good or not all(isinstance(size, int) and size > 0 for size in cache) or cache[1] < 2:
        raise ArgumentError(
            f"cache is {cache!r}; it takes (batch, largest length), such as (1, 512)."
        )
    if not takes_cache(model) or not hasattr(model, "generation_config"):
        raise ArgumentError(
            f"cache is for causal language models of transformers, and model is a "
            f"{type(model).__name__}."
        )
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    settings: Any = model.generation_config
    before = settings.use_cache, settings.cache_implementation
    settings.use_cache, settings.cache_implementation = True, "static"
    try:
        wrapper = TorchExportableModuleWithStaticCache(
            model, batch_size=cache[0], max_cache_len=cache[1]
        )
    finally:
        settings.use_cache, settings.cache_implementation = before
    tokens = min(cache[1], 8)
    ids = torch.ones(cache[0], tokens, dtype=torch.long)
    kwargs = {"input_ids": ids, "cache_position": torch.arange(tokens)}
    return wrapper, (), kwargs, {"input_ids": {1: Dim.AUTO}, "cache_position": {0: Dim.AUTO}}


def _exported(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any, *, strict: bool
) -> ExportedProgram:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # transformers' capture of outputs sets a variable during the call.
            warnings.filterwarnings("ignore", "While compiling, we found certain side effects")
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=strict)
    except Exception as error:
        raise UnsupportedError(
            f"torch.export can't follow the model: {type(error).__name__}: {first_line(error)} "
            "See https://docs.pytorch.org/docs/stable/export.html."
        ) from error


def _free(leaf: Any) -> Any:
    """The sizes that ``dynamic=True`` asks for."""
    return {i: Dim.AUTO for i in range(min(leaf.dim(), 2))} if isinstance(leaf, Tensor) else None


def _is_fixed(size: Any) -> bool:
    return str(size).isdigit()  # torch.export leaves a SymInt of a number


def _tell_fixed(given: dict[str, Tensor], first: int) -> None:
    """Warn about batch sizes and lengths that the model, or an example of size 1, has fixed."""
    for name, value in given.items():
        whole = not value.is_floating_point()  # token ids and masks have a length
        fixed = [i for i in range(first, min(value.dim(), 1 + whole)) if _is_fixed(value.shape[i])]
        if fixed:
            sizes = " and ".join(f"dimension {i} at {value.shape[i]}" for i in fixed)
            warnings.warn(
                f"package: the size of the input {name} is fixed, {sizes}. torch.export fixes a "
                "size that is 1 in example_inputs, or that the model's code decides by. "
                "dynamic=False says that this is meant.",
                ArgumentWarning,
                stacklevel=3,
            )


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """Writes a package and its library in a folder of their own, and moves them when complete."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        partial = Path(folder) / target.name
        yield partial
        for name in (LIBRARY, target.name):
            os.replace(partial.with_name(name), target.with_name(name))


def _compile(program: ExportedProgram, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance.treespec", FutureWarning)  # torch's own
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _described(values: Mapping[str, Any]) -> dict[str, str]:
    """The dtypes and shapes of tensors. A free size has a letter."""
    letters: dict[str, str] = {}
    found = {}
    for name, value in values.items():
        sizes = []
        for size in value.shape:
            symbol = str(size)
            if not _is_fixed(size):
                symbol = letters.setdefault(symbol, chr(ord("a") + len(letters)))
            sizes.append(symbol)
        dtype = str(value.dtype).removeprefix("torch.")
        found[name] = f"{dtype} ({', '.join(sizes)})"
    return found
