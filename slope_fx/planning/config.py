"""``SlopeConfig``: sparsity, masks and adapters of a model."""

import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, SupportsIndex, TypedDict, cast

import torch
from torch import Tensor

from slope_fx.errors import ArgumentError
from slope_fx.methods import Method, method_of
from slope_fx.planning.masks import MASK_METHODS
from slope_fx.planning.patterns import Pattern, PatternRules

MaskChoice = str | Callable[[str, Tensor], Tensor]
AdapterRank = int | float | None
AdapterInit = str | Callable[[str, Tensor, Tensor, int], tuple[Tensor, Tensor]]
Sparsity = str | Pattern | Mapping[str, str | Pattern | None]

ADAPTER_INITS = ("zero", "svd", "eora")
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CALLABLE = "callable"
"""The value in JSON in place of a function."""


class ConfigOptions(TypedDict, total=False):
    """The fields of :class:`SlopeConfig` besides ``sparsity``, as keyword arguments."""

    mask: MaskChoice
    adapter_rank: AdapterRank
    adapter_init: AdapterInit
    skip_first: bool
    skip_head: bool
    skip_router: bool
    method: str | Method


@dataclass(frozen=True)
class SlopeConfig:
    """The configuration of the pruning of a model. A checkpoint stores it.

    Attributes:
        sparsity: an N:M pattern with M in 2, 4, 8, 16; or a mapping from ``fnmatch`` patterns on
            the qualified name of a layer to a pattern. The first match wins, and None keeps a
            layer dense.
        mask: how the forward mask is chosen. "magnitude"; "wanda", magnitude times the norm of the
            input over the calibration inputs (arXiv 2306.11695); "transposable", large
            magnitudes in a mask that is N:M along the columns too, so that the backward pass
            prunes nothing (arXiv 2102.08124, 2404.01847); "random"; or a callable
            (name, weight) -> bool mask, with weight and mask of shape (d_out, d_in) and exactly N
            of each M kept in a row.
        adapter_rank: rank of the low-rank adapters, or a float in (0, 1) as a fraction of the
            input width of each layer; None for no adapters. They take part once a
            :class:`~slope_fx.Schedule` reaches their phase.
        adapter_init: initial adapters. "zero": adapters that add nothing until they train. "svd",
            for a pretrained model: the best approximation of the pruned part of the weight.
            "eora", for a pretrained model: the best approximation of the contribution of the
            pruned part to the outputs over the calibration inputs (EoRA, arXiv 2410.21271). A
            callable (name, weight, mask, rank) -> (A, B), of shapes (r, d_in) and (d_out, r): the
            product B A is added. All adapters except "zero" are active from the first step.
        skip_first: keep the linears that read the embeddings or the input dense.
        skip_head: keep the linear that makes the output dense.
        skip_router: keep the linears with ranked outputs dense, such as the router of a mixture of
            experts. They are small and have a large effect.
        method: how the weights are stored and trained, by name or as an object of
            :mod:`slope_fx.methods` with other numbers. "slope", the default, stores only the kept
            values. So does "evolve", whose masks move. "dense" prunes nothing, as a control.
            "sr-ste" (arXiv 2102.04010), "s-ste" (arXiv 2409.09099) and "gradual" (arXiv 2402.04744)
            store the dense weight and end in :func:`slope_fx.compress_`. Each step of a Schedule
            chooses their masks again.

    Raises:
        ArgumentError: a field has a value that is not allowed.
    """

    sparsity: Sparsity = "2:4"
    mask: MaskChoice = "magnitude"
    adapter_rank: AdapterRank = None
    adapter_init: AdapterInit = "zero"
    skip_first: bool = True
    skip_head: bool = True
    skip_router: bool = True
    method: str | Method = "slope"

    def __post_init__(self) -> None:
        rules = PatternRules(self.sparsity)
        object.__setattr__(self, "sparsity", rules.as_given())
        object.__setattr__(self, "adapter_rank", _checked_rank(self.adapter_rank))
        object.__setattr__(self, "method", method_of(self.method))
        _check_mask(self.mask)
        for name in ("skip_first", "skip_head", "skip_router"):
            check_choice(name, getattr(self, name), (True, False))
        _check_adapter_init(self.adapter_init, self.adapter_rank)

    @classmethod
    def of(cls, sparsity: "Sparsity | SlopeConfig", options: ConfigOptions) -> "SlopeConfig":
        """The configuration from a SlopeConfig, or from a sparsity and keyword arguments.

        Raises:
            ArgumentError: a value is not allowed, or keyword arguments were given with a
                SlopeConfig.
        """
        if not isinstance(sparsity, SlopeConfig):
            return cls(sparsity, **options)
        if options:
            raise ArgumentError(
                f"{', '.join(options)} can't be given beside a SlopeConfig, which has it: use "
                "dataclasses.replace(config, ...)."
            )
        return sparsity

    @property
    def needs_calibration(self) -> str:
        """The argument that needs calibration inputs, as the user wrote it, or ""."""
        method = MASK_METHODS.get(self.mask) if isinstance(self.mask, str) else None
        if method is not None and method.needs_inputs:
            return f'mask="{self.mask}"'
        return 'adapter_init="eora"' if self.adapter_init == "eora" else ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data for JSON. A function becomes "callable"."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["method"] = method_of(self.method).to_data()
        return {name: CALLABLE if callable(value) else value for name, value in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SlopeConfig":
        """The inverse of :meth:`to_dict`.

        Raises:
            ArgumentError: a field is unknown, or a value is not allowed.
        """
        if data.get("storage") == "values":  # until 0.3, which had no other
            data = {name: value for name, value in data.items() if name != "storage"}
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in data if name not in known]:
            raise ArgumentError(
                f"a SlopeConfig has no {unknown[0]!r}; its fields are {', '.join(known)}."
            )
        return cls(**data)

    def to_json(self) -> str:
        """The fields as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "SlopeConfig":
        """The inverse of :meth:`to_json`.

        Raises:
            ArgumentError: ``text`` is not the JSON of a SlopeConfig.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ArgumentError(f"the text is not JSON: {error}.") from None
        if not isinstance(data, dict):
            raise ArgumentError(f"the text is a {type(data).__name__}, not an object.")
        return cls.from_dict(data)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Returns a supported dtype of weights, given as a name or as a dtype. None stays None.

    Raises:
        ArgumentError: the dtype is not supported.
    """
    names = {str(known).removeprefix("torch."): known for known in SUPPORTED_DTYPES}
    known = names.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and known not in SUPPORTED_DTYPES:
        raise ArgumentError(f"dtype={dtype!r}; allowed are {', '.join(names)}, and None.")
    return known


def check_choice(argument: str, value: object, allowed: tuple[object, ...]) -> None:
    """Check that ``value`` equals an allowed value and has the same type.

    Raises:
        ArgumentError: it does not.
    """
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ArgumentError(f"{argument}={value!r}; allowed are {', '.join(map(repr, allowed))}.")


def _check_mask(mask: object) -> None:
    if callable(mask) or mask == CALLABLE or (isinstance(mask, str) and mask in MASK_METHODS):
        return
    got = repr(mask) if isinstance(mask, str) else f"a {type(mask).__name__}"
    names = ", ".join(f'"{name}"' for name in MASK_METHODS)
    raise ArgumentError(
        f"mask is {got}; allowed are {names}, or a callable (name, weight) -> bool tensor like "
        "weight."
    )


def _check_adapter_init(adapter_init: object, adapter_rank: object) -> None:
    if not callable(adapter_init) and adapter_init not in (*ADAPTER_INITS, CALLABLE):
        raise ArgumentError(
            f"adapter_init={adapter_init!r}; allowed are {', '.join(map(repr, ADAPTER_INITS))}, or "
            "a callable (name, weight, mask, rank) -> (A, B)."
        )
    if adapter_init != "zero" and adapter_rank is None:
        raise ArgumentError(
            f"adapter_init={adapter_init!r} needs adapters, but adapter_rank is None. Pass "
            "adapter_rank, such as 16."
        )


def _checked_rank(adapter_rank: AdapterRank) -> AdapterRank:
    """``adapter_rank`` as a plain number."""
    good = adapter_rank is None
    if not good and not isinstance(adapter_rank, bool):
        if hasattr(adapter_rank, "__index__"):  # NumPy integers are allowed
            adapter_rank = operator.index(cast(SupportsIndex, adapter_rank))
            good = adapter_rank >= 1
        else:
            good = isinstance(adapter_rank, float) and 0 < adapter_rank < 1
    if not good:
        raise ArgumentError(
            f"adapter_rank={adapter_rank!r}; allowed are a positive int, a float between 0 and 1 "
            "(a fraction of each layer's input width), or None for no adapters."
        )
    return adapter_rank
