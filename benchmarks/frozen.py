"""A frozen model against the dense one: a decoding step by batch, prefill, and bytes.

Both sides are compiled as one graph (``torch.compile``) and write to a static cache, which is the
best road to decode a dense model. Adapters are active, of rank d_in / 64. The logits of each side
are first compared with those of a dense model with the same weights.

    python benchmarks/frozen.py
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from common import agree, compare, interleave, parser, write
from tabulate import tabulate
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import slope_fx

MODELS = {  # layers, width, vocabulary
    "Llama 4x512": (4, 512, 4096),
    "Llama 24x1024": (24, 1024, 32000),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "2:4": {},
    "2:4 + adapters": {"rank": 1 / 64},
    "2:4 int8": {"values": "int8"},
    "2:4 int8 + adapters": {"rank": 1 / 64, "values": "int8"},
    "2:4 int4": {"values": "int4"},
}
CONTEXT = 256
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def llama(layers: int, width: int, vocabulary: int, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, vocab_size=vocabulary,
        max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def frozen(dense: nn.Module, rank: float | None = None, values: str = "float") -> nn.Module:
    """A frozen copy of the dense model, with trained adapters if it has a rank."""
    model = slope_fx.compile(copy.deepcopy(dense), "2:4", adapter_rank=rank)
    if rank:
        slope_fx.Schedule(model, 1, 0.0)
        for weight in slope_fx.sparse_weights(model).values():
            assert weight.lora_B is not None
            weight.lora_B.normal_(0, 0.02)
    with torch.enable_grad():
        slope_fx.freeze(model, values=values)  # type: ignore[arg-type]
    ids = torch.randint(0, 1000, (1, 8))
    plain = slope_fx.densify(model).float()
    dtype = dense.get_input_embeddings().weight.dtype  # type: ignore[operator]
    agree(model(ids).logits.float(), plain(ids).logits, f"{values} {rank}", TOLERANCE[dtype])
    return model


def linear_bytes(model: nn.Module) -> int:
    """The bytes of the sparse weights with all that belongs to them."""
    found = {}
    for weight in slope_fx.sparse_weights(model).values():
        for tensor in (weight.values, *weight.parameters()):
            found[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(found.values())


def decoding(call: Callable[..., Any], config: Any, batch: int, dtype: torch.dtype) -> Any:
    """One decoding step, in the middle of a static cache."""
    cache = StaticCache(config=config, max_cache_len=CONTEXT)
    ids = torch.randint(0, 1000, (batch, 1))
    state = {"step": 0}

    def step() -> None:
        if state["step"] % (CONTEXT - 1) == 0:
            cache.reset()
        call(ids, past_key_values=cache, use_cache=True)
        state["step"] += 1

    return step


def prefill(call: Callable[..., Any], tokens: int) -> Callable[[], Any]:
    ids = torch.randint(0, 1000, (1, tokens))
    return lambda: call(ids, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    arguments.add_argument("--prefills", type=int, nargs="+", default=[512, 2048])
    arguments.add_argument("--models", nargs="+", default=list(MODELS))
    arguments.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    arguments.add_argument("--variants", nargs="+", default=list(VARIANTS))
    args = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.models:
        for dtype_name in args.dtypes:
            dtype = getattr(torch, dtype_name)
            torch._dynamo.reset()
            dense = llama(*MODELS[name], dtype)
            models = {v: frozen(dense, **VARIANTS[v]) for v in tqdm(args.variants)}
            calls: dict[str, Callable[..., Any]] = {"dense": torch.compile(dense), **models}
            pruned = set(slope_fx.sparse_weights(next(iter(models.values()))))
            dense_bytes = sum(
                p.numel() * p.element_size()
                for n, p in dense.named_parameters()
                if n.removesuffix(".weight") in pruned
            )
            about = {"model": name, "dtype": dtype_name}
            for variant, model in models.items():
                rows.append({
                    **about, "variant": variant, "what": "bytes", "dense_bytes": dense_bytes,
                    "bytes": linear_bytes(model), "ratio": linear_bytes(model) / dense_bytes,
                })  # fmt: skip
            cases: list[tuple[str, int, Any]] = [
                *[("decode", b, {v: decoding(c, dense.config, b, dtype) for v, c in calls.items()})
                  for b in args.batches],
                *[("prefill", t, {v: prefill(c, t) for v, c in calls.items()})
                  for t in args.prefills],
            ]  # fmt: skip
            for what, size, runs in cases:
                for run in runs.values():
                    run()
                    run()
                rounds = args.rounds if what == "decode" else max(3, args.rounds // 4)
                seconds = interleave(runs, rounds)
                for variant in models:
                    found = compare(seconds, "dense", variant)
                    rows.append({**about, "variant": variant, "what": what, "size": size, **found})
                    print(about, what, size, variant, f"{found['speedup']:.2f}", flush=True)
    write("frozen", args, rows=rows)
    shown = [[r["model"], r["dtype"], r["what"], r.get("size"), r["variant"],
              f"{r.get('speedup', r.get('ratio')):.3f}"] for r in rows]  # fmt: skip
    print(
        tabulate(
            shown,
            ("model", "dtype", "what", "size", "variant", "dense / ours, bytes: ours / dense"),
        )
    )


if __name__ == "__main__":
    main()
