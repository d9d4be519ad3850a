"""The operations of the engine: each allocates its result and launches a kernel.

``Triton`` in ``__init__.py`` has the methods and documents the shapes.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from slope_fx.kernels import quantised, racing
from slope_fx.kernels.packing import packed_width
from slope_fx.kernels.triton import configs, linear, masks, reduce, tuning, weight_grad, weights
from slope_fx.kernels.triton.configs import Config

_MOST_PARTS = 32


# --- masks and weights ---------------------------------------------------------------------


def magnitude_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """The packed forward mask of ``weight`` (d_out, d_in): the N top magnitudes of each group."""
    weight = _addressable(weight)
    d_out, d_in = weight.shape
    bits = weight.new_empty(d_out, packed_width(d_in), dtype=torch.uint8)
    sizes = (d_out, d_in, *weight.stride(), bits.stride(0))

    def launch(config: Config) -> None:
        masks.magnitude_mask[_tiles(config, d_out, d_in, m)](
            weight, bits, *sizes, N=n, M=m, **config.arguments()
        )

    key = (d_out, d_in, n, m, weight.dtype)
    _run("magnitude_mask", key, configs.mask_configs(m), launch, weight)
    return bits


def backward_mask(values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """The packed backward mask, one bit per value: N:M along d_out, a subset of the values."""
    values, forward_mask = values.contiguous(), forward_mask.contiguous()
    d_out, d_in = _dense_shape(values, n, m)
    bits = forward_mask.new_empty(d_out, packed_width(values.shape[1]))

    tensors = (values, forward_mask, bits)
    sizes = (d_out, d_in, forward_mask.stride(0), bits.stride(0))

    def launch(config: Config) -> None:
        masks.backward_mask[_tiles(config, d_out, d_in, m)](
            *tensors, *sizes, N=n, M=m, **config.arguments()
        )

    key = (d_out, d_in, n, m, values.dtype)
    _run("backward_mask", key, configs.backward_mask_configs(m), launch, values)
    return bits


def expand(values: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """Dense ``W^R`` (d_out, d_in) from its kept values (d_out, d_in * N / M)."""
    return _expand(values, forward_mask, None, n, m)


def expand_twice_pruned(
    values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
) -> Tensor:
    """Dense ``W^{R,C}`` (d_out, d_in)."""
    return _expand(values, forward_mask, backward_mask, n, m)


def expand_quantised(
    codes: Tensor,
    scales: Tensor,
    forward_mask: Tensor,
    n: int,
    m: int,
    group: int,
    d_in: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dense ``W^R`` (d_out, d_in) of quantised values, rounded to ``dtype``."""
    dense = scales.new_empty(codes.shape[0], d_in, dtype=dtype)
    return _expand_into(dense, codes, scales, forward_mask, None, n, m, group)


def _expand(
    values: Tensor, forward_mask: Tensor, backward_mask: Tensor | None, n: int, m: int
) -> Tensor:
    dense = values.new_empty(_dense_shape(values, n, m))
    return _expand_into(dense, values, None, forward_mask, backward_mask, n, m, 0)


def _expand_into(
    dense: Tensor,
    values: Tensor,
    scales: Tensor | None,
    forward_mask: Tensor,
    backward_mask: Tensor | None,
    n: int,
    m: int,
    group: int,
) -> Tensor:
    values, forward_mask = values.contiguous(), forward_mask.contiguous()
    twice = forward_mask if backward_mask is None else backward_mask.contiguous()
    d_out, d_in = dense.shape
    tensors = (values, _or_dummy(scales, values), forward_mask, twice, dense)
    sizes = (d_out, d_in, forward_mask.stride(0), twice.stride(0))
    constants = {"N": n, "M": m, "TWICE": backward_mask is not None}
    constants |= {"BITS": _bits(values, scales), "GROUP": group}

    def launch(config: Config) -> None:
        weights.expand[_tiles(config, d_out, d_in, m)](
            *tensors, *sizes, **constants, **config.arguments()
        )

    key = (d_out, d_in, n, m, dense.dtype, values.dtype, group, backward_mask is not None)
    _run("expand", key, configs.copy_configs(m), launch, values)
    return dense


def compress(dense: Tensor, forward_mask: Tensor, n: int, m: int) -> Tensor:
    """The kept values (d_out, d_in * N / M) of ``dense`` (d_out, d_in)."""
    dense, forward_mask = _addressable(dense), forward_mask.contiguous()
    d_out, d_in = dense.shape
    values = dense.new_empty(d_out, d_in * n // m)

    tensors = (dense, forward_mask, values)
    sizes = (d_out, d_in, *dense.stride(), forward_mask.stride(0))

    def launch(config: Config) -> None:
        weights.compress[_tiles(config, d_out, d_in, m)](
            *tensors, *sizes, N=n, M=m, **config.arguments()
        )

    _run("compress", (d_out, d_in, n, m, dense.dtype), configs.copy_configs(m), launch, dense)
    return values


# --- products ------------------------------------------------------------------------------


def sparse_linear(
    x: Tensor,
    values: Tensor,
    forward_mask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
) -> Tensor:
    """``Y = X (W^R)^T + b``."""
    return _linear(x, values, None, forward_mask, bias, n, m, 0)


def quantised_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    forward_mask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    group: int,
) -> Tensor:
    """``Y = X (W^R)^T + b`` with quantised values, which are rounded to the dtype of ``x``."""
    return _linear(x, codes, scales, forward_mask, bias, n, m, group)


def _linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor | None,
    forward_mask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    group: int,
) -> Tensor:
    d_out, d_in = values.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], d_out))
    x, values, forward_mask = _rows(x), values.contiguous(), forward_mask.contiguous()
    tokens = x.shape[0]
    if not tokens:
        return y
    inputs = (x, values, _or_dummy(scales, values), forward_mask, _or_dummy(bias, x))
    sizes = (tokens, d_out, d_in, forward_mask.stride(0), x.stride(0))
    constants = {"N": n, "M": m, "BIAS": bias is not None, "PRECISION": _precision(x)}
    constants |= {"BITS": _bits(values, scales), "GROUP": group}

    def launch(config: Config) -> None:
        tiles = _cdiv(d_out, config["BLOCK_OUT"]) * _cdiv(tokens, config["BLOCK_TOKENS"])
        with _Split(config, tiles, _cdiv(d_in, config["GROUPS"] * m), y) as split:
            linear.linear[tiles, split.count](
                *inputs, split.target, *sizes, split.count, **constants, **config.arguments()
            )

    kinds = (x.dtype, values.dtype, group, bias is not None)
    key = (racing.bucket(tokens), d_out, d_in, n, m, *kinds)
    space = configs.linear_configs(m, tokens, x.element_size())
    _run("linear", key, space, launch, x)
    return y


def sparse_input_grad(
    grad: Tensor, values: Tensor, forward_mask: Tensor, backward_mask: Tensor, n: int, m: int
) -> Tensor:
    """``grad_X = grad_Y W^{R,C}``, without a transpose of the weight."""
    d_out, d_in = _dense_shape(values, n, m)
    dx = grad.new_empty((*grad.shape[:-1], d_in))
    grad, values = _rows(grad), values.contiguous()
    forward_mask, backward_mask = forward_mask.contiguous(), backward_mask.contiguous()
    tokens = grad.shape[0]
    if not tokens:
        return dx

    inputs = (grad, values, forward_mask, backward_mask)
    strides = (forward_mask.stride(0), backward_mask.stride(0), grad.stride(0))
    sizes = (tokens, d_out, d_in, *strides)
    constants = {"N": n, "M": m, "PRECISION": _precision(grad)}

    def launch(config: Config) -> None:
        tiles = _cdiv(d_in, config["GROUPS"] * m) * _cdiv(tokens, config["BLOCK_TOKENS"])
        with _Split(config, tiles, _cdiv(d_out, config["BLOCK_OUT"]), dx) as split:
            linear.input_grad[tiles, split.count](
                *inputs, split.target, *sizes, split.count, **constants, **config.arguments()
            )

    key = (racing.bucket(tokens), d_out, d_in, n, m, grad.dtype, values.dtype)
    space = configs.input_grad_configs(m, tokens, grad.element_size())
    _run("input_grad", key, space, launch, grad)
    return dx


def sparse_weight_grad(
    grad: Tensor,
    x: Tensor,
    forward_mask: Tensor,
    n: int,
    m: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``grad_W = grad_Y^T X`` at the kept positions, compressed. In fp32 it is not rounded."""
    d_out, d_in = grad.shape[-1], x.shape[-1]
    dw = grad.new_empty(d_out, d_in * n // m, dtype=dtype or grad.dtype)
    grad, x, forward_mask = _rows(grad), _rows(x), forward_mask.contiguous()
    tokens = x.shape[0]
    if not tokens:
        return dw.zero_()

    inputs = (grad, x, forward_mask)
    sizes = (tokens, d_out, d_in, forward_mask.stride(0), grad.stride(0), x.stride(0))
    constants = {"N": n, "M": m, "PRECISION": _precision(x)}

    def launch(config: Config) -> None:
        tiles = _cdiv(d_out, config["BLOCK_OUT"]) * _cdiv(d_in, config["GROUPS"] * m)
        with _Split(config, tiles, _cdiv(tokens, config["BLOCK_TOKENS"]), dw) as split:
            weight_grad.weight_grad[tiles, split.count](
                *inputs, split.target, *sizes, split.count, **constants, **config.arguments()
            )

    key = (racing.bucket(tokens), d_out, d_in, n, m, x.dtype, dw.dtype)
    space = configs.weight_grad_configs(m, x.element_size())
    _run("weight_grad", key, space, launch, x)
    return dw


# --- launches ------------------------------------------------------------------------------


def _run(
    kernel: str,
    key: tuple[object, ...],
    space: list[Config],
    launch: Callable[[Config], None],
    tensor: Tensor,
) -> None:
    """Launch a kernel with the fastest configuration for ``key``, on the device of ``tensor``."""
    device = tensor.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        launch(tuning.best(kernel, key, space, launch, device))


class _Split:
    """Splits the sums of a product over several programs, if there are too few programs.

    Attributes:
        count: number of parts; 1 without a split.
        target: tensor that the programs write to: the result, or fp32 parts. The end of the
            context adds the parts to the result.
    """

    def __init__(self, config: Config, tiles: int, blocks: int, result: Tensor) -> None:
        wanted = min(_cdiv(config.waves * _multiprocessors(result.device), tiles), _MOST_PARTS)
        each = _cdiv(blocks, max(1, min(wanted, blocks)))
        self.count = _cdiv(blocks, each)
        self._result = result
        self.target = result
        if self.count > 1:
            self.target = result.new_empty(self.count, result.numel(), dtype=torch.float32)

    def __enter__(self) -> "_Split":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self.count > 1:
            length = self._result.numel()
            reduce.add_up[(_cdiv(length, configs.REDUCE["BLOCK"]),)](
                self.target, self._result, length, self.count, **configs.REDUCE.arguments()
            )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # in the interpreter: a number with which sums are split
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tiles(config: Config, d_out: int, d_in: int, m: int) -> tuple[int]:
    return (_cdiv(d_in // m, config["GROUPS"]) * _cdiv(d_out, config["BLOCK_OUT"]),)


def _dense_shape(values: Tensor, n: int, m: int) -> tuple[int, int]:
    return values.shape[0], values.shape[1] * m // n


def _or_dummy(tensor: Tensor | None, other: Tensor) -> Tensor:
    """The tensor for a kernel; ``other``, which the kernel does not read, in place of None."""
    return other if tensor is None else tensor.contiguous()


def _bits(values: Tensor, scales: Tensor | None) -> int:
    """The bits of a code; 0 for values."""
    return 0 if scales is None else quantised.BITS[quantised.kind_of(values)]


def _rows(tensor: Tensor) -> Tensor:
    """The tensor as (rows, columns) with adjacent columns; a copy only if no view is possible."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _addressable(weight: Tensor) -> Tensor:
    """The weight with columns at offsets below 2^31 in a row. Kernels count columns in 32 bits and
    rows in 64 bits."""
    return weight if weight.stride(1) * weight.shape[1] < 2**31 else weight.contiguous()


def _precision(tensor: Tensor) -> str:
    """How fp32 operands are multiplied: in three TF32 products, which are nearly as exact as fp32,
    or in one, if PyTorch allows TF32. ("ieee", without tensor cores, spills hundreds of
    registers.)"""
    matmul = torch.backends.cuda.matmul
    # PyTorch has two switches. Reading the older one fails after the newer one was set.
    allowed = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
    return "tf32x3" if tensor.dtype == torch.float32 and allowed != "tf32" else "tf32"


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
