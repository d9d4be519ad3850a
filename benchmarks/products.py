"""The three products by shape, pattern and dtype: the CPU engine against the dense product.

The dense side is ``torch.compile`` of the dense product in the same dtype; the input
gradient has the refresh of the compressed transpose in it. Results are checked against
float64 first.

    python benchmarks/products.py
"""

from collections.abc import Callable

import torch
from common import agree, compare, interleave, parser, write
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from slope_fx.kernels.cpu import Cpu

cpu = Cpu()
SHAPES = ((768, 768), (768, 3072), (3072, 768), (2048, 2048), (4096, 4096))
"""(d_in, d_out)."""


def products(tokens: int, d_in: int, d_out: int, n: int, m: int, dtype: torch.dtype) -> dict[
    str, tuple[Callable[[], Tensor], Callable[[], Tensor], Tensor]
]:  # fmt: skip
    """For each product: dense, sparse, and the sparse result in float64."""
    weight = torch.randn(d_out, d_in).to(dtype)
    forward = cpu.magnitude_mask(weight, n, m)
    values = cpu.compress(weight, forward, n, m)
    backward = cpu.backward_mask(values, forward, n, m)
    x, grad = torch.randn(tokens, d_in).to(dtype), torch.randn(tokens, d_out).to(dtype)
    some = slice(0, 64)  # of the tokens, for the check
    w = cpu.expand(values, forward, n, m)
    twice = cpu.expand(*cpu.transpose(values, forward, backward, n, m), n, m).t()
    dw = cpu.compress((grad.float().t() @ x.float()).contiguous(), forward, n, m)
    dense = {
        "forward": torch.compile(lambda: torch.nn.functional.linear(x, weight)),
        "input gradient": torch.compile(lambda: grad @ weight),
        "weight gradient": torch.compile(lambda: grad.t() @ x),
    }
    sparse = {
        "forward": lambda: cpu.sparse_linear(x, values, forward, None, n, m),
        "input gradient": lambda: cpu.sparse_input_grad(grad, values, forward, backward, n, m),
        "weight gradient": lambda: cpu.sparse_weight_grad(grad, x, forward, n, m),
    }
    want = {
        "forward": x[some].double() @ w.double().t(),
        "input gradient": grad[some].double() @ twice.double(),
        "weight gradient": dw,
    }
    return {name: (dense[name], sparse[name], want[name]) for name in dense}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=1024)
    arguments.add_argument("--rounds", type=int, default=7)
    args = arguments.parse_args()
    torch.manual_seed(0)
    found = []
    cases = [
        (d_in, d_out, n, m, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for n, m in ((2, 4), (2, 8))
        for d_in, d_out in SHAPES
    ]
    for d_in, d_out, n, m, dtype in tqdm(cases, unit="case"):
        torch._dynamo.reset()
        rounds = args.rounds if d_in * d_out < 2**23 else max(3, args.rounds // 2)
        made = products(args.tokens, d_in, d_out, n, m, dtype)
        for name, (dense, sparse, want) in made.items():
            eps = torch.finfo(dtype).eps
            off = agree(sparse()[: len(want)], want, f"{name} {d_in}x{d_out}", 4 * eps + 1e-5)
            seconds = interleave({"dense": dense, "sparse": sparse}, rounds)
            found.append(
                {
                    "product": name,
                    "d_in": d_in,
                    "d_out": d_out,
                    "pattern": f"{n}:{m}",
                    "dtype": str(dtype).removeprefix("torch."),
                    "difference": off,
                    **compare(seconds, "dense", "sparse"),
                }
            )
    rows = [
        (
            r["dtype"], r["pattern"], f"{r['d_in']} -> {r['d_out']}", r["product"],
            1e3 * r["dense_seconds"], 1e3 * r["sparse_seconds"], r["speedup"],
            "{:.2f} to {:.2f}".format(*r["speedup_quartiles"]),
        )
        for r in found
    ]  # fmt: skip
    headers = ("dtype", "N:M", "d_in -> d_out", "product", "dense ms", "sparse ms",
               "times faster", "half of the pairs")  # fmt: skip
    print(tabulate(rows, headers, floatfmt=".2f"))
    write("products", args, products=found)


if __name__ == "__main__":
    main()
