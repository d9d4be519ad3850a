"""A call of a frozen model: from Python, compiled by Inductor, and as a package of AOTInductor.

A Llama of 4 blocks of width 512 with adapters. The call of the package is timed in the process
that made it; its code is the same in others.

    python benchmarks/package.py
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import agree, interleave, parser, write
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import slope_fx

CALLS = {"one token": (1, 1, 40), "8 sequences, one token": (8, 1, 40), "512 tokens": (1, 512, 2)}


def frozen(args: Any, dtype: torch.dtype) -> torch.nn.Module:
    config = LlamaConfig(
        num_hidden_layers=args.layers, hidden_size=args.width, intermediate_size=4 * args.width,
        num_attention_heads=args.width // 64, num_key_value_heads=args.width // 64,
        vocab_size=args.vocab_size, max_position_embeddings=1024,
    )  # fmt: skip
    model = slope_fx.compile(LlamaForCausalLM(config).to(dtype).eval(), "2:4", adapter_rank=8)
    slope_fx.Schedule(model, 10, adapter_start=0.0)
    for weight in slope_fx.sparse_weights(model).values():
        weight.lora_B.normal_(0, 0.01)
    return slope_fx.freeze(model)


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--width", type=int, default=512)
    arguments.add_argument("--vocab-size", type=int, default=4096)
    arguments.add_argument("--rounds", type=int, default=15)
    args = arguments.parse_args()
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = frozen(args, dtype)
        with tempfile.TemporaryDirectory() as folder:
            made = slope_fx.package(model, Path(folder) / "model.pt2")
            torch.ops.load_library(made.library)
            packaged = torch._inductor.aoti_load_package(made.path)
        for name, (rows, length, times) in CALLS.items():
            ids = torch.randint(0, args.vocab_size, (rows, length))

            def python(ids: torch.Tensor = ids, times: int = times, model: Any = model) -> None:
                for _ in range(times):
                    model(input_ids=ids, use_cache=False)

            def package(ids: torch.Tensor = ids, times: int = times, run: Any = packaged) -> None:
                for _ in range(times):
                    run(input_ids=ids)

            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
            logits = model(input_ids=ids, use_cache=False).logits.float()
            agree(packaged(input_ids=ids).float(), logits, name, tolerance)
            with torch.inference_mode():
                seconds = interleave({"python": python, "package": package}, args.rounds)
            medians = {run: statistics.median(s) / times * 1e3 for run, s in seconds.items()}
            found[f"{str(dtype).removeprefix('torch.')}, {name}"] = medians
    rows = [[name, call["python"], call["package"]] for name, call in found.items()]
    print(tabulate(rows, ["median, ms a call", "Python", "package"], floatfmt=".3f"))
    write("package", args, milliseconds=found)


if __name__ == "__main__":
    main()
