"""A stand-in for cuSPARSELt on the CPU, which checks its arguments as the library would.

It takes the place of the three operators that PyTorch binds the library by, so that all of the
engine's own code runs, its narrow interface included. Compressed operands have the size and the
parts of real ones: rows of values first, then two bits for the place of each. Where the library
is known to go wrong without a word, this raises.
"""

import contextlib
from collections import Counter

import torch
from torch import Tensor

calls: Counter[str] = Counter()
SEARCHED = 7
"""The algorithm that a search finds."""


class RefusedError(RuntimeError):
    """What the library would have refused, or misread."""


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise RefusedError(what)


def _check_matrix(matrix: Tensor, multiple: int, what: str) -> None:
    _check(matrix.dim() == 2, f"{what} has {matrix.dim()} dimensions")
    _check(matrix.dtype in (torch.bfloat16, torch.float16), f"{what} is {matrix.dtype}")
    _check(all(size % multiple == 0 for size in matrix.shape), f"{what} is {tuple(matrix.shape)}")
    _check(matrix.numel() > 0, f"{what} is empty")
    _check(matrix.data_ptr() % 16 == 0, f"{what} is not aligned")


def compress(dense: Tensor) -> Tensor:
    calls["compress"] += 1
    _check_matrix(dense, 16, "the sparse matrix")
    _check(dense.is_contiguous(), "the sparse matrix is not contiguous")
    rows, columns = dense.shape
    groups = dense.view(rows, columns // 4, 4)
    _check(bool(((groups != 0).sum(-1) <= 2).all()), "more than two of four are not zero")
    places = torch.sort((groups != 0).to(torch.uint8), dim=-1, descending=True, stable=True)
    places = places.indices[..., :2].sort(-1).values
    values = groups.gather(-1, places).reshape(-1)
    codes = places.reshape(-1, 4).to(torch.uint8)
    packed = codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6
    blob = dense.new_empty(rows, columns * 9 // 16)
    flat = blob.view(-1)
    flat[: values.numel()] = values
    flat[values.numel() :].view(torch.uint8).copy_(packed)
    return blob


def _expanded(blob: Tensor, columns: int) -> Tensor:
    rows = blob.numel() * 16 // 9 // columns
    _check(rows * columns * 9 == blob.numel() * 16, "the operand is of another matrix")
    flat = blob.view(-1)
    values = flat[: rows * columns // 2].view(rows, columns // 4, 2)
    packed = flat[rows * columns // 2 :].view(torch.uint8)
    codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    places = codes.view(rows, columns // 4, 2).long()
    dense = blob.new_zeros(rows, columns // 4, 4).scatter_(-1, places, values)
    return dense.view(rows, columns)


def multiply(operand, dense, bias=None, alpha=None, out_dtype=None, transpose_result=False,
             alg_id=0, split_k=1, split_k_mode=-1):  # fmt: skip
    calls["multiply"] += 1
    _check(alg_id in (0, SEARCHED), f"there is no algorithm {alg_id}")
    return _product(operand, dense, bias, transpose_result)


def _product(blob: Tensor, b: Tensor, bias: Tensor | None, transpose_result: bool) -> Tensor:
    _check_matrix(b, 8, "the dense operand")
    _check(blob.dtype == b.dtype, "the operands differ in dtype")
    # PyTorch takes the dense operand for transposed if it isn't contiguous, and its memory as it
    # then must lie.
    read = b if b.is_contiguous() else b.as_strided(b.shape, (1, b.shape[0]))
    _check(torch.equal(read.nan_to_num(), b.nan_to_num()), "the dense operand is misread")
    weight = _expanded(blob, b.shape[0])
    if bias is not None:
        _check(bias.dtype == b.dtype, "the bias differs in dtype")
        _check(bias.shape == weight.shape[:1] and bias.is_contiguous(), "the bias has no place")
        _check(bias.data_ptr() % 16 == 0, "the bias is not aligned")
    y = (weight.float() @ read.float()).t()
    y = (y if bias is None else y + bias.float()).to(b.dtype)
    return y.contiguous() if transpose_result else y.t().contiguous()


def search(operand, dense, bias=None, alpha=None, out_dtype=None, transpose_result=False):
    calls["search"] += 1
    _product(operand, dense, bias, transpose_result)
    return SEARCHED


_library = torch.library.Library("aten", "IMPL")


@contextlib.contextmanager
def installed(monkeypatch):
    """The engine "cusparselt", on the CPU, with this in the library's place."""
    from slope_fx.kernels import engines, selection
    from slope_fx.kernels.cusparselt import Cusparselt, library

    if not calls["installed"]:  # for the process: a second time torch would refuse
        calls["installed"] = 1
        _library.impl("_cslt_compress", compress, "CPU")
        _library.impl("_cslt_sparse_mm", multiply, "CPU")
        _library.impl("_cslt_sparse_mm_search", search, "CPU")
    engine = Cusparselt(engines.ENGINES["cpu"])
    monkeypatch.setattr(library, "why_not", lambda device: "")
    monkeypatch.setattr(library, "unavailable", lambda: "")
    monkeypatch.setitem(engines.ENGINES, "cusparselt", engine)
    monkeypatch.setattr(engine, "devices", ("cpu",))
    selection.forget()
    calls.update(compress=-calls["compress"], multiply=-calls["multiply"], search=-calls["search"])
    yield engine
    selection.forget()
