"""Tokens per second of ``generate``, one sequence at a time, SLoPe against dense.

Both under ``torch.compile``, in fp32 and in bf16. A few logits of the sparse model are first
held against a plain model of its own dense weights.

    python benchmarks/decoding.py
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from common import agree, compare, gpt2, interleave, parser, write
from tabulate import tabulate
from torch import nn

import slope_fx


def generator(model: Any, ids: torch.Tensor, count: int) -> Callable[[], None]:
    def generate() -> None:
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    return generate


def check(dense: nn.Module, sparse: nn.Module, ids: torch.Tensor, tolerance: float) -> float:
    """The compiled sparse model's logits against a plain model of its expanded weights."""
    plain = copy.deepcopy(dense)
    parameters = dict(plain.named_parameters())
    for name, weight in slope_fx.sparse_weights(sparse).items():
        parameters[f"{name}.weight"].data.copy_(weight.to_dense().t())
    plain.float()
    return agree(sparse(ids).logits.float(), plain(ids).logits, "logits", tolerance)


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--width", type=int, default=2048)
    arguments.add_argument("--vocab-size", type=int, default=8192)
    arguments.add_argument("--prompt", type=int, default=1, help="tokens")
    arguments.add_argument("--tokens", type=int, default=32, help="generated in a run")
    arguments.add_argument("--rounds", type=int, default=5)
    args = arguments.parse_args()
    torch.manual_seed(0)
    ids = torch.randint(0, args.vocab_size, (1, args.prompt))
    found: dict[str, Any] = {}
    parameters = 0
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()  # or the two dtypes share one limit of recompiles
        dense = gpt2(args.layers, args.width, args.vocab_size, 256).to(dtype).eval()
        parameters = sum(p.numel() for p in dense.parameters())
        sparse = slope_fx.compile(copy.deepcopy(dense), "2:4")
        off = check(dense, sparse, ids, 0.05 if dtype == torch.bfloat16 else 1e-4)
        dense.compile(backend="inductor")
        runs = {
            "dense": generator(dense, ids, args.tokens),
            "sparse": generator(sparse, ids, args.tokens),
        }
        for run in runs.values():  # compiles for the prompt, for one token, for any cache
            run()
        result = compare(interleave(runs, args.rounds), "dense", "sparse")
        found[str(dtype).removeprefix("torch.")] = {
            **result,
            "difference": off,
            "dense_tokens_per_second": args.tokens / result["dense_seconds"],
            "sparse_tokens_per_second": args.tokens / result["sparse_seconds"],
        }
    rows = [
        (dtype, r["dense_tokens_per_second"], r["sparse_tokens_per_second"], r["speedup"],
         "{:.2f} to {:.2f}".format(*r["speedup_quartiles"]))
        for dtype, r in found.items()
    ]  # fmt: skip
    print(f"GPT-2 of {parameters / 1e6:.0f} M parameters, tokens per second:")
    headers = ("dtype", "dense", "SLoPe 2:4", "times faster", "half of the pairs")
    print(tabulate(rows, headers, floatfmt=".2f"))
    write("decoding", args, parameters=parameters, decoding=found)


if __name__ == "__main__":
    main()
