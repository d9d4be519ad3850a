"""What the pass join_linears gains: q, k and v, or gate and up, of a frozen model in one call,
beside one call for each. Compiled by Inductor, one token, bf16, 2:4.

    python benchmarks/joined.py
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import agree, compare, interleave, parser, write
from tabulate import tabulate
from torch import Tensor, nn

import slope_fx

CASES: dict[str, tuple[int, tuple[int, ...]]] = {
    "Llama 4x512, q k v": (512, (512, 512, 512)),
    "Llama 4x512, gate up": (512, (2048, 2048)),
    "SmolLM2-135M, q k v": (576, (576, 192, 192)),
    "SmolLM2-135M, gate up": (576, (1536, 1536)),
    "Llama 7B, q k v": (4096, (4096, 4096, 4096)),
    "Llama 7B, gate up": (4096, (11008, 11008)),
}
"""Name -> d_in, and d_out of each."""
LAYERS, LARGE_LAYERS = 8, 2
"""Of the small cases, and of those of Llama 7B."""


class Layers(nn.Module):
    """Several times the same group of products, so that the call of the model weighs little."""

    def __init__(self, d_in: int, groups: list[list[nn.Linear]]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(nn.ModuleList(group) for group in groups)
        self.d_in = d_in

    def forward(self, x: Tensor) -> Tensor:
        for group in self.groups:
            for y in [layer(x) for layer in group]:  # type: ignore[union-attr]
                # One kernel of Inductor for all of them: the sides differ in the products alone.
                x = x + F.pad(y[..., : self.d_in], (0, max(0, self.d_in - y.shape[-1])))
        return x


def frozen(d_in: int, weights: list[list[Tensor]], rank: int | None, join: bool) -> nn.Module:
    groups = []
    for group in weights:
        groups.append([nn.Linear(d_in, len(weight), bias=False) for weight in group])
        for linear, weight in zip(groups[-1], group, strict=True):
            linear.weight.data.copy_(weight)
    model = slope_fx.compile(
        Layers(d_in, groups).bfloat16().eval(), "2:4", skip_first=False, skip_head=False,
        example_inputs=torch.randn(1, d_in).bfloat16(), adapter_rank=rank,
        disable_passes=() if join else ("join_linears",),
    )  # fmt: skip
    if rank is not None:
        slope_fx.Schedule(model, 1, adapter_start=0.0)
    return slope_fx.freeze(model)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=300)
    args = arguments.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name, (d_in, sizes) in CASES.items():
        layers = LARGE_LAYERS if d_in >= 4096 else LAYERS
        weights = [[torch.randn(d, d_in) / d_in for d in sizes] for _ in range(layers)]
        for rank in (None, 16):
            apart, joined = (frozen(d_in, weights, rank, join) for join in (False, True))
            x = torch.randn(1, d_in).bfloat16()
            with torch.no_grad():
                agree(joined(x), apart(x), name, 0.02)
                sides = {"apart": partial(apart, x), "joined": partial(joined, x)}
                seconds = interleave(sides, args.rounds)
            case = {"case": name, "rank": rank or 0}
            rows.append({**case, **compare(seconds, "apart", "joined")})
            print(case, f"{rows[-1]['speedup']:.3f}", flush=True)
            torch._dynamo.reset()
    write("joined", args, rows=rows)
    columns = ("case", "rank", "speedup")
    print(tabulate([[row[c] for c in columns] for row in rows], ("", "rank", "times faster")))


if __name__ == "__main__":
    main()
