"""What kept transposes gain: gradient accumulation with them and without, in turns in one process.

The input gradient needs the compressed transpose of a weight. Where training uses it again between
two optimizer steps, the CPU engine keeps it; ``SLOPE_FX_KEEP_OPERANDS=0`` keeps none.

    python benchmarks/transposes.py
"""

import argparse
import copy
import os
from collections.abc import Callable

import torch
from common import agree, compare, interleave, parser, write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import slope_fx

Run = Callable[[], Tensor]

ACCUMULATED, TOKENS = 4, 128


def llama(args: argparse.Namespace) -> nn.Module:
    config = LlamaConfig(
        num_hidden_layers=args.layers, hidden_size=args.width, intermediate_size=3 * args.width,
        num_attention_heads=args.width // 64, num_key_value_heads=args.width // 64,
        vocab_size=1024, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def training(dense: nn.Module, micro_batches: list[Tensor], policy: str) -> Run:
    """A step of a sparse copy of ``dense`` over micro-batches, under a policy of what is kept."""
    model = slope_fx.compile(copy.deepcopy(dense))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> Tensor:
        os.environ["SLOPE_FX_KEEP_OPERANDS"] = policy
        total = torch.zeros(())
        for ids in micro_batches:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=3)
    arguments.add_argument("--width", type=int, default=768)
    arguments.add_argument("--rounds", type=int, default=15)
    args = arguments.parse_args()
    torch.manual_seed(0)
    dense = llama(args)
    batches = [torch.randint(0, 1024, (1, TOKENS)) for _ in range(ACCUMULATED)]
    runs = {"with": training(dense, batches, ""), "without": training(dense, batches, "0")}
    for _ in range(2):  # compiles; learns what is used again
        results = {name: run() for name, run in runs.items()}
    off = agree(results["with"], results["without"], "kept transposes", 1e-3)
    found = compare(interleave(runs, args.rounds), "without", "with")
    low, high = found["speedup_quartiles"]
    print(f"{found['speedup']:.3f}x faster with kept transposes ({low:.3f} to {high:.3f})")
    case = f"{ACCUMULATED} micro-batches of {TOKENS} tokens"
    write("transposes", args, case=case, **found, difference=off)


if __name__ == "__main__":
    main()
