"""The ops of a frozen model: products with weights that do not train.

On a CPU they run in C++ (``kernels/cpu/frozen.cpp``): a call takes a quarter of the time of an op
in Python, and programs that don't import slope_fx can call them. Elsewhere, and without a C++
compiler, the engines compute them.

Arguments of the ops:

- ``values``: (d_out, d_in * N / M), in the dtype of ``x``; or codes (``kernels/quantised.py``).
- ``scales``: the scales of codes; None for values.
- ``forward_mask``: packed, uint8 (d_out, ceil(d_in / 8)). It was checked when the model was frozen.
- ``lora_A``, ``lora_B``: (r, d_in) and (d_out, r), with the scale in ``lora_B``; or None.
- ``groups``, ``offsets``: of ``frozen_grouped_linear``, as in ``ops/groups.py``. The weights of a
  stack, such as the experts of a mixture, are stacked along the rows of each tensor.
- the lists of ``frozen_linears``: the operands of several weights with one ``x``. For few tokens
  they are computed together. None for a list: no weight has such a tensor. The list of forms is
  flat. All forms have the same length, and only their pairs differ.
- ``form``: N, M, bits and group of codes (0 for values), a number for the dtype of the model, d_in,
  and pairs (fewest tokens, route). Of the pairs with at most the tokens of the call, the last one
  is used (``kernels/cpu/routes.py``).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slope_fx.kernels.cpu.build import BuildError, ops_library
from slope_fx.kernels.cpu.routes import FORM_DTYPES
from slope_fx.kernels.engines import ENGINES, say_once
from slope_fx.kernels.selection import choose
from slope_fx.ops.autocast import register_autocast
from slope_fx.ops.dispatch import engine, refuse_onnx, request_of
from slope_fx.ops.groups import map_rows

_LIBRARY = torch.library.Library("slope_fx", "FRAGMENT")
_SCHEMAS = (
    "frozen_linear(Tensor x, Tensor values, Tensor forward_mask, Tensor? scales, Tensor? bias, "
    "Tensor? lora_A, Tensor? lora_B, int[] form) -> Tensor",
    "frozen_linears(Tensor x, Tensor[] values, Tensor[] forward_masks, Tensor[]? scales, "
    "Tensor[]? biases, Tensor[]? lora_As, Tensor[]? lora_Bs, int[] forms) -> Tensor[]",
    "frozen_grouped_linear(Tensor x, Tensor values, Tensor forward_mask, Tensor? scales, "
    "Tensor? lora_A, Tensor? lora_B, Tensor? offsets, int groups, int[] form) -> Tensor",
    "frozen_expand(Tensor values, Tensor forward_mask, Tensor? scales, Tensor? lora_A, "
    "Tensor? lora_B, int[] form) -> Tensor",
)
_NAMES = tuple(schema.partition("(")[0] for schema in _SCHEMAS)
for _name, _schema in zip(_NAMES, _SCHEMAS, strict=True):
    if not hasattr(torch.ops.slope_fx, _name):  # a packaged library may have defined it
        _LIBRARY.define(_schema)
FROZEN_LINEAR = torch.ops.slope_fx.frozen_linear.default
FROZEN_LINEARS = torch.ops.slope_fx.frozen_linears.default
FROZEN_GROUPED_LINEAR = torch.ops.slope_fx.frozen_grouped_linear.default
FROZEN_EXPAND = torch.ops.slope_fx.frozen_expand.default


def dtype_of(values: Tensor, form: Sequence[int]) -> torch.dtype:
    """The dtype of the dense weight, and of the inputs of its product."""
    return values.dtype if values.is_floating_point() else FORM_DTYPES[form[4]]


@functools.cache
def why_not_native() -> str:
    """Load the C++ ops for the CPU. Returns the reason why this is not possible, or ""."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if all(has_kernel(f"slope_fx::{name}", "CPU") for name in _NAMES):
        return ""  # by a packaged library
    try:
        torch.ops.load_library(str(ops_library()))
    except (BuildError, OSError) as error:
        say_once(
            "slope_fx computes frozen models by the engines, which is slower for few tokens, "
            f"because the ops in C++ cannot be built: {error}."
        )
        return str(error)
    return ""


def _is_native(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not why_not_native()


def _linear(
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    form: list[int],
) -> Tensor:
    """``Y = X (W^R)^T + b + (X A^T) B^T`` by the engines."""
    if _is_native(x):
        y: Tensor = FROZEN_LINEAR(x, values, forward_mask, scales, bias, lora_a, lora_b, form)
        return y
    n, m, _, group = form[:4]
    if scales is not None:
        y = engine(x).quantised_linear(x, values, scales, forward_mask, bias, n, m, group)
    else:
        product = ENGINES[choose("sparse_linear", request_of(x, values, n, m))]
        y = product.sparse_linear(x, values, forward_mask, bias, n, m)
    if lora_a is not None and lora_b is not None:
        y = y + F.linear(F.linear(x, lora_a), lora_b)
    return y


def _linears(
    x: Tensor,
    values: list[Tensor],
    forward_masks: list[Tensor],
    scales: list[Tensor] | None,
    biases: list[Tensor] | None,
    lora_as: list[Tensor] | None,
    lora_bs: list[Tensor] | None,
    forms: list[int],
) -> list[Tensor]:
    """The products of several weights with the same ``x``."""
    if _is_native(x):
        results: list[Tensor] = FROZEN_LINEARS(
            x, values, forward_masks, scales, biases, lora_as, lora_bs, forms
        )
        return results
    count = len(values)
    optional: list[Any] = [t or [None] * count for t in (scales, biases, lora_as, lora_bs)]
    length = len(forms) // count
    parts = [forms[k * length : (k + 1) * length] for k in range(count)]
    return [
        FROZEN_LINEAR(x, *each)
        for each in zip(values, forward_masks, *optional, parts, strict=True)
    ]


def _expand(
    values: Tensor,
    forward_mask: Tensor,
    scales: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    form: list[int],
) -> Tensor:
    """The dense ``W^R + B A``, of each weight of a stack."""
    if _is_native(values):
        dense: Tensor = FROZEN_EXPAND(values, forward_mask, scales, lora_a, lora_b, form)
        return dense
    n, m, _, group = form[:4]
    if scales is None:
        dense = engine(values).expand(values, forward_mask, n, m)
    else:
        format = (n, m, group, form[5], dtype_of(values, form))
        dense = engine(scales).expand_quantised(values, scales, forward_mask, *format)
    if lora_a is None or lora_b is None:
        return dense
    groups = lora_a.shape[0] // lora_b.shape[1]
    factors = (t.unflatten(0, (groups, -1)) for t in (lora_b, lora_a))
    return torch.baddbmm(dense.unflatten(0, (groups, -1)), *factors).flatten(0, 1)


def _grouped_linear(
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    scales: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    offsets: Tensor | None,
    groups: int,
    form: list[int],
) -> Tensor:
    """The product of each weight of a stack with its rows of ``x``, by the engines."""
    stack = values, forward_mask, scales, None, lora_a, lora_b
    if _is_native(x):
        y: Tensor = FROZEN_GROUPED_LINEAR(
            x, values, forward_mask, scales, lora_a, lora_b, offsets, groups, form
        )
        return y

    def product(rows: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        y: Tensor = FROZEN_LINEAR(rows, *(t if t is None else part(t) for t in stack), form)
        return y

    return map_rows(product, x, values.shape[0] // groups, groups, offsets)


# CompositeExplicitAutograd is what a device without a kernel of its own runs.
_LIBRARY.impl("frozen_linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("frozen_linears", _linears, "CompositeExplicitAutograd")
_LIBRARY.impl("frozen_grouped_linear", _grouped_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("frozen_expand", _expand, "CompositeExplicitAutograd")


@torch.library.register_fake("slope_fx::frozen_linear")
def _(x: Tensor, values: Tensor, *operands: Any) -> Tensor:
    _check_input(x, values, operands[-1])
    return x.new_empty((*x.shape[:-1], values.shape[0]))


@torch.library.register_fake("slope_fx::frozen_linears")
def _(x: Tensor, values: list[Tensor], *operands: Any) -> list[Tensor]:
    for each in values:
        _check_input(x, each, operands[-1])
    return [x.new_empty((*x.shape[:-1], each.shape[0])) for each in values]


@torch.library.register_fake("slope_fx::frozen_grouped_linear")
def _(x: Tensor, values: Tensor, *operands: Any) -> Tensor:
    _check_input(x, values, operands[-1])
    return x.new_empty((*x.shape[:-1], values.shape[0] // operands[-2]))


def _check_input(x: Tensor, values: Tensor, form: Sequence[int]) -> None:
    refuse_onnx()
    torch._check(
        x.shape[-1] == form[5],
        lambda: (
            f"slope_fx::frozen_linear: x has {x.shape[-1]} features, the weight reads {form[5]}"
        ),
    )
    torch._check(
        x.dtype == dtype_of(values, form),
        lambda: f"slope_fx::frozen_linear: x is {x.dtype}, the weight {dtype_of(values, form)}",
    )


@torch.library.register_fake("slope_fx::frozen_expand")
def _(values: Tensor, *operands: Any) -> Tensor:
    refuse_onnx()
    form = operands[-1]
    return values.new_empty((values.shape[0], form[5]), dtype=dtype_of(values, form))


@torch.library.custom_op("slope_fx::frozen_linear_with_grad", mutates_args=())
def frozen_linear_with_grad(
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    form: list[int],
) -> Tensor:
    """``frozen_linear`` with the gradients of its input and its bias.

    Adapters that train in other layers need them, as those of PEFT.

    The gradient is that of ``W^R + B A``. A rule for autograd on ``frozen_linear`` itself would
    cost each call some 4 us, also without gradients.
    """
    y: Tensor = FROZEN_LINEAR(x, values, forward_mask, scales, bias, lora_a, lora_b, form)
    return y


@frozen_linear_with_grad.register_fake
def _(x: Tensor, values: Tensor, *operands: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, mask, scales, _, lora_a, lora_b, ctx.form = inputs
    ctx.save_for_backward(values, mask, scales, lora_a, lora_b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, mask, scales, lora_a, lora_b = ctx.saved_tensors
    dx = grad @ FROZEN_EXPAND(values, mask, scales, None, None, ctx.form)
    if lora_a is not None:
        dx = dx + (grad @ lora_b) @ lora_a
    dbias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[4] else None
    return dx, None, None, None, dbias, None, None, None


frozen_linear_with_grad.register_autograd(_backward, setup_context=_save)
FROZEN_LINEAR_WITH_GRAD = torch.ops.slope_fx.frozen_linear_with_grad.default


def _autocast(dtype: torch.dtype, x: Tensor, values: Any, *operands: Any) -> tuple[Any, ...]:
    # The weight keeps its dtype: a cast at each call would cost more than the product.
    one = values if isinstance(values, Tensor) else values[0]
    return x.to(dtype_of(one, operands[-1])), values, *operands


def _autocast_with_bias(
    dtype: torch.dtype, x: Tensor, values: Any, masks: Any, scales: Any, bias: Any, *operands: Any
) -> tuple[Any, ...]:
    x, *rest = _autocast(dtype, x, values, masks, scales, *operands)
    if isinstance(bias, Tensor):
        bias = bias.to(x.dtype)
    elif bias is not None:
        bias = [each.to(x.dtype) for each in bias]
    return x, *rest[:3], bias, *rest[3:]


register_autocast(FROZEN_LINEAR, _autocast_with_bias)
register_autocast(FROZEN_LINEARS, _autocast_with_bias)
register_autocast(FROZEN_GROUPED_LINEAR, _autocast)
register_autocast(FROZEN_LINEAR_WITH_GRAD, _autocast_with_bias)
