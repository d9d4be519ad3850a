"""The cuSPARSELt engine: 2:4 products on NVIDIA's sparse tensor cores, in bf16 and fp16.

The forward product and the input gradient, for 2:4 and all patterns contained in it: with at most
two of four consecutive, as 1:2, 1:4 and 2:8 have. The weight gradient is the vendor's dense
product; of masks, expand and compress another engine's kernels take care.

``library.py`` is the narrow interface to the library, ``kernels/operands.py`` keeps what is made
from a weight where it is used again before that changes. The operand of the input gradient is that
of the transpose of ``W^{R,C}``. It takes 9/16 of the dense 16-bit weight, beside the values.

PyTorch makes and destroys a plan at each call, some tenths of a millisecond on the host.
"""

import json
from types import ModuleType

import torch
from torch import Tensor

from slope_fx.kernels import racing
from slope_fx.kernels.cusparselt import library
from slope_fx.kernels.modes import undisturbed
from slope_fx.kernels.operands import Operands
from slope_fx.kernels.vendor import VendorProducts

_ALGORITHMS = tuple(map(str, range(1024)))


class Cusparselt(VendorProducts):
    """The engine, with another one's kernels around the products.

    Attributes:
        operands: what it made of the weights that it met.
    """

    DEVICES = ("cuda",)

    def __init__(self, around: ModuleType) -> None:
        super().__init__(around)
        self.operands = Operands()
        self._algorithms: dict[tuple[object, ...], int] = {}

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str:
        """What keeps this engine from serving such tensors, or ""."""
        if reason := library.why_not(device):
            return reason
        if dtype not in library.DTYPES:
            return f"sparse tensor cores take bf16 and fp16, not {dtype}"
        reason = self.around.why_not(device, dtype)
        return reason and f"the engine around it can't serve: {reason}"

    def unavailable(self) -> str:
        """What keeps this engine from serving at all on this machine, or ""."""
        return library.unavailable() or str(self.around.unavailable())

    def why_not_pattern(self, n: int, m: int) -> str:
        """What keeps this engine from serving a pattern, or ""."""
        if (n <= 2 and m % 4 == 0) or (n, m) == (1, 2):
            return ""
        return f"{n}:{m} may keep more than two of four consecutive, and sparse tensor cores do 2:4"

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
        """``Y = X (W^R)^T + b``; with ``training`` it may be asked for again before a step."""

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
        """``grad_X = grad_Y W^{R,C}``."""

        def make() -> Tensor:
            masks = (forward_mask, backward_mask)
            dense = self.expand_twice_pruned(values.to(grad.dtype), *masks, n, m)
            return _compressed(dense.t())

        masks, purpose = (forward_mask, backward_mask), ("backward", grad.dtype, n, m)
        operand = self.operands.get(values, masks, purpose, make, training=True)
        return self._multiply(operand, grad, None, values.shape[1] * m // n)

    def sparse_weight_grad(
        self,
        grad: Tensor,
        x: Tensor,
        forward_mask: Tensor,
        n: int,
        m: int,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``grad_W = grad_Y^T X`` at the forward mask's positions, compressed; rounded to 16 bits
        before it is widened to ``dtype``."""
        values = super().sparse_weight_grad(grad, x, forward_mask, n, m)
        return values.to(dtype or grad.dtype)

    def _multiply(self, operand: Tensor, x: Tensor, bias: Tensor | None, d_out: int) -> Tensor:
        """``X W^T + b`` for X (..., d_in): (..., d_out)."""
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
            # It was found for other tokens, up to the same power of two.
            self._algorithms[self._key(operand, rows, bias)] = 0
            y = library.multiply(operand, rows, bias, 0)
        return y[:tokens, :d_out].contiguous().view(*x.shape[:-1], d_out)

    def _key(self, operand: Tensor, rows: Tensor, bias: Tensor | None) -> tuple[object, ...]:
        """What the best algorithm depends on."""
        tokens = racing.bucket(rows.shape[0])
        return (operand.shape[0], rows.shape[1], tokens, str(rows.dtype), bias is not None)

    def _algorithm(self, operand: Tensor, rows: Tensor, bias: Tensor | None) -> int:
        """The library's algorithm for a product: what its search finds, if faster than 0."""
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
        """Forget the operands and the algorithms of this process; what is on disk stays."""
        self.operands.forget()
        self._algorithms.clear()


def _compressed(dense: Tensor) -> Tensor:
    multiple = library.SPARSE_MULTIPLE
    return library.compress(_padded(dense, multiple, multiple))


def _padded(matrix: Tensor, row_multiple: int, column_multiple: int) -> Tensor:
    """As the library wants a matrix to lie, with zeros up to a multiple; a copy if it must be."""
    rows, columns = matrix.shape
    if rows % row_multiple or columns % column_multiple:
        more = (0, -columns % column_multiple, 0, -rows % row_multiple)
        matrix = torch.nn.functional.pad(matrix, more)
    matrix = matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() % library.ALIGNMENT else matrix
