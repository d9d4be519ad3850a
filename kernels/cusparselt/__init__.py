"""The cuSPARSELt engine: 2:4 products on the sparse tensor cores of NVIDIA GPUs, in bf16 and fp16.

The engine computes the forward product and the input gradient. It supports 2:4 and all patterns
that 2:4 contains, with at most two of four consecutive values: 1:2, 1:4, 2:8 and so on. The weight
gradient is the vendor's dense product. Another engine computes masks, expand and compress.

``library.py`` calls the library. ``kernels/operands.py`` keeps compressed operands while they can
be used again. The operand of the input gradient is made from the transpose of ``W^{R,C}``. Beside
the values, an operand takes 9/16 of the memory of the dense 16-bit weight.

PyTorch makes and destroys a plan of the library in each call. This takes some tenths of a
millisecond on the host.
"""

import json

import torch
from torch import Tensor

from slope_fx.kernels import racing
from slope_fx.kernels.cusparselt import library
from slope_fx.kernels.engine import Engine
from slope_fx.kernels.modes import undisturbed
from slope_fx.kernels.operands import Operands
from slope_fx.kernels.vendor import VendorProducts

_ALGORITHMS = tuple(map(str, range(1024)))


class Cusparselt(VendorProducts):
    """Products by cuSPARSELt, with the masks and conversions of another engine.

    Attributes:
        operands: the operands that the engine made from weights.
    """

    devices = ("cuda",)
    takes_wider_values = True
    keeps_operands = True
    may_refuse = True
    expands_weights = False

    def __init__(self, around: Engine) -> None:
        self.name = "cusparselt"
        self.around: Engine = around
        self.operands: Operands = Operands()
        self._algorithms: dict[tuple[object, ...], int] = {}

    def unavailable(self) -> str:
        return library.unavailable() or self.around.unavailable()

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str:
        if reason := library.why_not(device):
            return reason
        if dtype not in library.DTYPES:
            return f"sparse tensor cores support bf16 and fp16, not {dtype}"
        reason = self.around.why_not(device, dtype)
        return reason and f"it needs the {self.around.name} engine, which cannot run: {reason}"

    def why_not_pattern(self, n: int, m: int) -> str:
        if (n <= 2 and m % 4 == 0) or (n, m) == (1, 2):
            return ""
        return f"{n}:{m} can keep more than two of four consecutive values, unlike 2:4"

    def repeats(self, other: Engine, op: str) -> bool:
        """The weight gradient is that of the engine with the same masks and conversions."""
        return op == "sparse_weight_grad" and other.expands_weights and other.around is self.around

    def warns(self, allowed: tuple[str, ...], named: bool) -> bool:
        """No warning if the library is there, but does not support the GPU or the dtype."""
        return named or bool(self.unavailable())

    def sparse_linear(
        self,
        x: Tensor,
        values: Tensor,
        forward_mask: Tensor,
        bias: Tensor | None,
        n: int,
        m: int,
        training: bool = False,
    ) -> Tensor:
        def make() -> Tensor:
            dense = self.expand(values.to(x.dtype), forward_mask, n, m)
            return _compressed(dense)

        purpose = ("forward", x.dtype, n, m)
        operand = self.operands.get(values, (forward_mask,), purpose, make, training)
        return self._multiply(operand, x, bias, values.shape[0])

    def sparse_input_grad(
        self,
        grad: Tensor,
        values: Tensor,
        forward_mask: Tensor,
        backward_mask: Tensor,
        n: int,
        m: int,
    ) -> Tensor:
        def make() -> Tensor:
            masks = (forward_mask, backward_mask)
            dense = self.expand_twice_pruned(values.to(grad.dtype), *masks, n, m)
            return _compressed(dense.t())

        masks, purpose = (forward_mask, backward_mask), ("backward", grad.dtype, n, m)
        operand = self.operands.get(values, masks, purpose, make, training=True)
        return self._multiply(operand, grad, None, values.shape[1] * m // n)

    def _multiply(self, operand: Tensor, x: Tensor, bias: Tensor | None, d_out: int) -> Tensor:
        """``X W^T + b`` for ``x`` (..., d_in) and the operand of ``W``: (..., d_out)."""
        rows = x.reshape(-1, x.shape[-1])
        tokens = rows.shape[0]
        if not tokens:
            return x.new_empty((*x.shape[:-1], d_out))
        rows = _padded(rows, library.DENSE_MULTIPLE, library.SPARSE_MULTIPLE)
        if bias is not None:
            bias = _padded(bias.to(x.dtype).unsqueeze(0), 1, library.SPARSE_MULTIPLE).squeeze(0)
        algorithm = self._algorithm(operand, rows, bias)
        try:
            y = library.multiply(operand, rows, bias, algorithm)
        except RuntimeError as error:
            if not algorithm or isinstance(error, torch.OutOfMemoryError):
                raise
            # The algorithm was found for another number of tokens in the same bucket.
            self._algorithms[self._key(operand, rows, bias)] = 0
            y = library.multiply(operand, rows, bias, 0)
        return y[:tokens, :d_out].contiguous().view(*x.shape[:-1], d_out)

    def _key(self, operand: Tensor, rows: Tensor, bias: Tensor | None) -> tuple[object, ...]:
        """The properties of a product that its best algorithm depends on."""
        tokens = racing.bucket(rows.shape[0])
        return (operand.shape[0], rows.shape[1], tokens, str(rows.dtype), bias is not None)

    def _algorithm(self, operand: Tensor, rows: Tensor, bias: Tensor | None) -> int:
        """The algorithm for a product: the result of a search, or 0 if that is faster."""
        key = self._key(operand, rows, bias)
        if key not in self._algorithms:
            if not racing.can_measure(rows.device):
                return 0
            entry = json.dumps(["cusparselt", library.version(), *key])
            result = racing.recall(entry, _ALGORITHMS, rows.device)
            if result is None:
                with undisturbed():
                    found = library.search(operand, rows, bias)
                runs = {
                    str(a): lambda a=a: library.multiply(operand, rows, bias, a) for a in {0, found}
                }
                result = racing.run(entry, lambda: runs, tuple(runs), rows.device)
            self._algorithms[key] = int(result.winner)
        return self._algorithms[key]

    def forget(self) -> None:
        """Forget the operands and the algorithms of this process, but not those on disk."""
        self.operands.forget()
        self._algorithms.clear()


def _compressed(dense: Tensor) -> Tensor:
    multiple = library.SPARSE_MULTIPLE
    return library.compress(_padded(dense, multiple, multiple))


def _padded(matrix: Tensor, row_multiple: int, column_multiple: int) -> Tensor:
    """The matrix contiguous, aligned, and padded with zeros to multiples; a copy only if needed."""
    rows, columns = matrix.shape
    if rows % row_multiple or columns % column_multiple:
        more = (0, -columns % column_multiple, 0, -rows % row_multiple)
        matrix = torch.nn.functional.pad(matrix, more)
    matrix = matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() % library.ALIGNMENT else matrix
