"""The product with quantised values by shape and number of tokens, as in decoding: our int8 and
int4 at 2:4 against our bf16 at 2:4, PyTorch's dense bf16, and PyTorch's own int8 and int4 kernels
(``torch._weight_int8pack_mm``, a scale a row; ``torch._weight_int4pack_mm_for_cpu``, groups of 64).

Inputs are bf16. Results are checked against float64 first. Bytes are those of the weight with all
that belongs to it.

    python benchmarks/quantised.py
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import agree, interleave, parser, write
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from slope_fx.kernels import quantised
from slope_fx.kernels.cpu import Cpu

cpu = Cpu()
N, M = 2, 4
SHAPES = ((1024, 1024), (4096, 1024), (2048, 2048), (8192, 2048))
"""(d_out, d_in)."""
INT4_GROUP = 64

Products = dict[str, tuple[Callable[[Tensor], Tensor], float]]


def products(d_out: int, d_in: int) -> Products:
    """Each product as a function of x, with the bytes of its weight."""
    weight = torch.randn(d_out, d_in).bfloat16()
    forward = cpu.magnitude_mask(weight, N, M)
    values = cpu.compress(weight, forward, N, M)
    made: Products = {
        "dense bf16": (lambda x: torch.nn.functional.linear(x, weight), weight.nbytes),
        "bf16 2:4": (
            lambda x: cpu.sparse_linear(x, values, forward, None, N, M),
            values.nbytes + forward.nbytes,
        ),
    }
    for kind in quantised.BITS:
        group = quantised.DEFAULT_GROUP[kind]
        codes, scales = quantised.quantise(values, kind, group)

        def ours(x: Tensor, codes: Tensor = codes, scales: Tensor = scales, group: int = group):  # type: ignore[no-untyped-def]
            return cpu.quantised_linear(x, codes, scales, forward, None, N, M, group)

        dense = cpu.expand_quantised(codes, scales, forward, N, M, group, d_in, torch.float32)
        x = torch.randn(4, d_in).bfloat16()
        agree(ours(x), x.double() @ dense.double().t(), f"{kind} {d_out}x{d_in}", 2**-7)
        made[f"{kind} 2:4"] = ours, codes.nbytes + scales.nbytes + forward.nbytes
    int8 = torch.randint(-127, 128, (d_out, d_in), dtype=torch.int8)
    by_row = torch.rand(d_out).bfloat16()
    made["dense int8"] = (
        lambda x: torch._weight_int8pack_mm(x, int8, by_row),
        int8.nbytes + by_row.nbytes,
    )
    drawn = torch.randint(0, 16, (d_out, d_in), dtype=torch.int32)
    int4 = torch._convert_weight_to_int4pack_for_cpu(drawn, 1)
    by_group = torch.rand(d_in // INT4_GROUP, d_out, 2).bfloat16()
    made["dense int4"] = (
        lambda x: torch._weight_int4pack_mm_for_cpu(x, int4, INT4_GROUP, by_group),
        d_out * d_in / 2 + by_group.nbytes,
    )
    return made


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, nargs="*", default=[1, 4])
    arguments.add_argument("--rounds", type=int, default=200)
    args = arguments.parse_args()
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    for d_out, d_in in tqdm(SHAPES, unit="shape"):
        made = products(d_out, d_in)
        for tokens in args.tokens:
            x = torch.randn(tokens, d_in).bfloat16()
            runs = {name: partial(run, x) for name, (run, _) in made.items()}
            seconds = interleave(runs, args.rounds)
            for name, (_, nbytes) in made.items():
                time = statistics.median(seconds[name])
                low, _, high = statistics.quantiles(seconds[name], n=4)
                found.append(
                    {
                        "product": name,
                        "d_out": d_out,
                        "d_in": d_in,
                        "tokens": tokens,
                        "seconds": time,
                        "quartiles": [low, high],
                        "gigabytes_per_second": nbytes / time / 1e9,
                    }
                )
    rows = [
        (f"{r['d_in']} -> {r['d_out']}", r["tokens"], r["product"], 1e6 * r["seconds"],
         r["gigabytes_per_second"])
        for r in found
    ]  # fmt: skip
    headers = ("d_in -> d_out", "tokens", "product", "us", "GB/s")
    print(tabulate(rows, headers, floatfmt=".1f"))
    write("quantised", args, groups=quantised.DEFAULT_GROUP, quantised=found)


if __name__ == "__main__":
    main()
