"""What a rank holds and receives at 8, 64 and 1,024 ranks. It is arithmetic: nothing is run.

Two Llamas, 2:4, with adapters, sharded by FSDP2 as in ``examples/pretrain_fsdp.py`` on GPUs: fp32
shards, gradients and moments; all-gathers in bf16; gradients reduced in fp32.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import parser, write
from transformers import LlamaConfig

import slope_fx

MODELS = {
    "Llama 2 7B": LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=32000, architectures=["LlamaForCausalLM"],
    ),
    "Llama 3 70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, architectures=["LlamaForCausalLM"],
    ),
}  # fmt: skip
WORLDS = (8, 64, 1024)


def ranks(config: LlamaConfig, world: int, adapter_rank: int) -> dict[str, Any]:
    """Bytes of a rank, dense and sparse, and sparse with active adapters."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        found = [
            slope_fx.preview(
                Path(folder) / "config.json", dtype=dtype, measure=False, world_size=world,
                adapter_rank=adapter_rank,
            ).sharding
            for dtype in ("float32", "bfloat16")
        ]  # fmt: skip
    full, half = found
    assert full is not None
    assert half is not None
    sides = {}
    for name in ("dense", "sparse", "adapter"):
        stored, sent = getattr(full, name), getattr(half, name)
        sides[name] = {
            "held": stored.held,
            "masks": stored.masks,
            "block": sent.block,
            "rest": sent.rest,
            "all_gather": sent.all_gather,
            "reduce_scatter": stored.reduce_scatter,
            "refresh": stored.refresh,
            "shards": asdict(stored),
        }
    return {"split_layers": full.split_layers, **sides}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--adapter-rank", type=int, default=64, help="(default: %(default)s)")
    args = options.parse_args()
    models = {
        name: {str(world): ranks(config, world, args.adapter_rank) for world in WORLDS}
        for name, config in MODELS.items()
    }
    write("scaling", args, models=models)


if __name__ == "__main__":
    main()
