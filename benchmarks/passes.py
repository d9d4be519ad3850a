"""What each fusion gains: the same model with it and without, in turns in one process.

Each case compiles a model with all passes and with one of them off, checks that both compute the
same, and times them; the last ones have all fusions off. What is kept between micro-batches (the
transposes of the CPU engine) is no pass: it is turned off by ``SLOPE_FX_KEEP_OPERANDS=0``.

    python benchmarks/passes.py
"""

import argparse
import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from common import agree, compare, interleave, parser, write
from tabulate import tabulate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import slope_fx

Run = Callable[[], Tensor]
Make = Callable[[tuple[str, ...]], Run]
"""From the passes that are off to what is timed."""

FUSIONS = ("fuse_bias", "fuse_adapters", "merge_linears")
ACCUMULATED = 4


class Perceptron(nn.Module):
    """Layers that write their bias apart: ``x @ w + b``."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        scale = width**-0.5
        self.weights = nn.ParameterList(torch.randn(width, width) * scale for _ in range(layers))
        self.biases = nn.ParameterList(torch.randn(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = torch.nn.functional.gelu(x @ weight + bias)
        return x


def llama(args: argparse.Namespace) -> nn.Module:
    config = LlamaConfig(
        num_hidden_layers=args.layers, hidden_size=args.width, intermediate_size=3 * args.width,
        num_attention_heads=args.width // 64, num_key_value_heads=args.width // 64,
        vocab_size=1024, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def compiled(dense: nn.Module, disabled: tuple[str, ...], **more: Any) -> nn.Module:
    torch.manual_seed(0)  # the same adapters in each
    wanted = [name for name in FUSIONS if name not in disabled]  # some are off by default
    model = slope_fx.compile(
        copy.deepcopy(dense), disable_passes=disabled, enable_passes=wanted, **more
    )
    for weight in slope_fx.sparse_weights(model).values():
        if weight.lora_B is not None:
            torch.nn.init.normal_(weight.lora_B, std=0.02)
    return model


def training(model: nn.Module, *inputs: Tensor) -> Run:
    """A step over micro-batches, one for each of ``inputs``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> Tensor:
        total = torch.zeros(())
        for x in inputs:
            y = model(x) if x.is_floating_point() else model(input_ids=x, labels=x).loss
            loss = y.float().square().mean()
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def evaluation(model: nn.Module, ids: Tensor) -> Run:
    model.eval()

    @torch.no_grad()
    def run() -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    return run


def measure(what: str, fusion: str, runs: dict[str, Run], rounds: int) -> dict[str, Any]:
    """One case, checked and timed."""
    for _ in range(2):  # compiles; learns what is used again
        results = {name: run() for name, run in runs.items()}
    off = agree(results["with"], results["without"], what, 1e-3)
    found = compare(interleave(runs, rounds), "without", "with")
    low, high = found["speedup_quartiles"]
    return {
        "case": what, "fusion": fusion, "with_seconds": found["sparse_seconds"],
        "without_seconds": found["dense_seconds"], "gain": found["speedup"],
        "gain_quartiles": [low, high], "difference": off,
    }  # fmt: skip


def keeping(run: Run, policy: str) -> Run:
    def with_policy() -> Tensor:
        os.environ["SLOPE_FX_KEEP_OPERANDS"] = policy
        return run()

    return with_policy


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=3)
    arguments.add_argument("--width", type=int, default=768)
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--rounds", type=int, default=15)
    args = arguments.parse_args()
    torch.manual_seed(0)
    dense = llama(args)
    perceptron, x = Perceptron(args.width, 4), torch.randn(512, args.width)
    few, many = (torch.randint(0, 1024, (1, t)) for t in (1, 512))
    micro = [torch.randint(0, 1024, (1, 128)) for _ in range(ACCUMULATED)]
    entries = []

    def case(what: str, fusion: str, off: tuple[str, ...], make: Make) -> None:
        torch._dynamo.reset()
        runs = {"with": make(()), "without": make(off)}
        entries.append(measure(what, fusion, runs, args.rounds))
        print(f"{what}, {fusion}: {entries[-1]['gain']:.3f}", flush=True)

    def trained(off: tuple[str, ...]) -> Run:
        return training(compiled(dense, off), many)

    def adapted(ids: Tensor) -> Make:
        def make(off: tuple[str, ...]) -> Run:
            model = compiled(dense, off, adapter_rank=args.rank)
            slope_fx.Schedule(model, 1, adapter_start=0.0)
            return evaluation(model, ids)

        return make

    def plain(ids: Tensor) -> Make:
        return lambda off: evaluation(compiled(dense, off), ids)

    def layered(off: tuple[str, ...]) -> Run:
        return training(compiled(perceptron, off, example_inputs=x), x)

    case("Llama, training, 512 tokens", "merge_linears", ("merge_linears",), trained)
    case("Llama, forward, 1 token", "merge_linears", ("merge_linears",), plain(few))
    case("Llama, adapters, 1 token", "fuse_adapters", ("fuse_adapters",), adapted(few))
    case("Llama, adapters, 512 tokens", "fuse_adapters", ("fuse_adapters",), adapted(many))
    case("x @ w + b, training, 512 tokens", "fuse_bias", ("fuse_bias",), layered)
    case("Llama, adapters, 1 token", "all", FUSIONS, adapted(few))
    case("Llama, training, 512 tokens", "all", FUSIONS, trained)

    torch._dynamo.reset()
    model = compiled(dense, ())
    step = training(model, *micro)
    twins = {
        "with": keeping(step, ""),
        "without": keeping(training(compiled(dense, ()), *micro), "0"),
    }
    what = f"Llama, training, {ACCUMULATED} x 128 tokens"
    entries.append(measure(what, "kept transposes", twins, args.rounds))

    headers = ("case", "fusion", "times faster with it", "half of the pairs")
    rows = [
        (
            e["case"],
            e["fusion"],
            f"{e['gain']:.3f}",
            "{:.3f} to {:.3f}".format(*e["gain_quartiles"]),
        )
        for e in entries
    ]
    print(tabulate(rows, headers))
    write("passes", args, fusions=entries)


if __name__ == "__main__":
    main()
