"""Frozen models against dense ones: a decoding step by batch, prefill, and bytes.

All sides are compiled as one graph (``torch.compile``) and write to a static cache, which is the
best road to decode a dense model. The dense model also runs with weights that Inductor packs for
oneDNN ("packed"), and in bf16 with PyTorch's own int8 product. A speed-up is taken against the
faster of "dense" and "packed". Adapters are active, of rank d_in / 64. The logits of each side are
first compared with those of a dense model with the same weights.

    python benchmarks/frozen.py
"""

import copy
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import agree, commit, compare, gpt2, interleave, parser, rest, write
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import slope_fx

CONTEXT = 256
PLAIN = ("2:4", "2:4 + adapters")
VARIANTS: dict[str, dict[str, Any]] = {
    "2:4": {},
    "2:4 + adapters": {"rank": 1 / 64},
    "2:4 int8": {"values": "int8"},
    "2:4 int8 + adapters": {"rank": 1 / 64, "values": "int8"},
    "2:4 int4": {"values": "int4"},
    "2:4 int4 + adapters": {"rank": 1 / 64, "values": "int4"},
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def llama(
    layers: int, width: int, inner: int, vocabulary: int, heads: int, keys: int
) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=keys, vocab_size=vocabulary,
            max_position_embeddings=4096, tie_word_embeddings=True,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "Llama 4x512": lambda: llama(4, 512, 2048, 4096, 8, 8),
    "GPT-2, 420 M": lambda: gpt2(8, 2048, 8192, 2048),
    "SmolLM2-135M": lambda: llama(30, 576, 1536, 49152, 9, 3),
}


class Int8Linear(nn.Module):
    """A dense linear by PyTorch's int8 product, with a scale a row."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scales = weight.abs().amax(1) / 127
        codes = (weight / scales[:, None]).round().to(torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch._weight_int8pack_mm(x.flatten(0, -2), self.codes, self.scales)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def dense_int8(dense: Any, pruned: set[str]) -> nn.Module:
    """A copy of the dense model, with int8 in the layers that others prune."""
    model = copy.deepcopy(dense)
    for name in pruned:
        old = model.get_submodule(name)
        weight = old.weight if isinstance(old, nn.Linear) else old.weight.t().contiguous()
        model.set_submodule(name, Int8Linear(weight, old.bias))
    return model


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


def decoding(call: Callable[..., Any], config: Any, batch: int) -> Callable[[], Any]:
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


def measure(args: Any, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """All cases of one model in one dtype."""
    torch._dynamo.reset()
    # All sides run the same code: with the default of 8 the last ones would not be compiled.
    torch._dynamo.config.recompile_limit = 200
    torch._dynamo.config.accumulated_recompile_limit = 2000
    torch.manual_seed(0)
    dense = MODELS[name]().to(dtype).eval().requires_grad_(False)
    variants = VARIANTS if dtype == torch.bfloat16 else {v: VARIANTS[v] for v in PLAIN}
    models = {v: frozen(dense, **more) for v, more in tqdm(variants.items(), desc=name)}
    pruned = set(slope_fx.sparse_weights(models[PLAIN[0]]))
    calls: dict[str, Callable[..., Any]] = {
        "dense": torch.compile(dense),
        "packed": torch.compile(copy.deepcopy(dense), options={"freezing": True}),
        **models,
    }
    if dtype == torch.bfloat16:
        calls["dense int8"] = torch.compile(dense_int8(dense, pruned))
    whole = sum(
        p.numel() * p.element_size()
        for n, p in dense.named_parameters()
        if n.removesuffix(".weight") in pruned
    )
    cases: list[dict[str, Any]] = []
    sizes = [("decode", b) for b in args.batches] + [("prefill", t) for t in args.prefills]
    for what, size in sizes:
        if what == "prefill":
            calls.pop("dense int8", None)  # for few tokens; takes minutes
        runs = {
            side: decoding(call, dense.config, size) if what == "decode" else prefill(call, size)
            for side, call in calls.items()
        }
        for run in runs.values():
            run()
            run()
        seconds = interleave(runs, args.rounds if what == "decode" else 4)
        best = min(("dense", "packed"), key=lambda side: statistics.median(seconds[side]))
        pairs = {v: compare(seconds, best, v) for v in models}
        if "dense int8" in runs:
            pairs["dense int8"] = compare(seconds, best, "dense int8")
        adapters = compare(seconds, PLAIN[1], PLAIN[0])
        cases.append({"what": what, "size": size, "best": best, "sides": pairs,
                      "adapters_cost": adapters["speedup"]})  # fmt: skip
        told = {v: round(pair["speedup"], 2) for v, pair in pairs.items()}
        print(name, dtype, what, size, best, told, f"{adapters['speedup']:.3f}", flush=True)
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in dense.parameters()),
        "bytes": {v: linear_bytes(m) / whole for v, m in models.items()},
        "cases": cases,
    }


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    arguments.add_argument("--prefills", type=int, nargs="+", default=[512, 2048])
    arguments.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    arguments.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    args = arguments.parse_args()
    found = rest("frozen", "frozen", args, model=args.models, dtype=args.dtypes)
    for dtype in args.dtypes:
        for name in args.models:
            measured = measure(args, name, getattr(torch, dtype))
            found.append({"commit": commit(), "rounds": args.rounds, **measured})
            gc.collect()
            write("frozen", args, frozen=found)
    rows = [
        (f["model"], f["dtype"], case["what"], case["size"], side, f"{pair['speedup']:.2f}")
        for f in found for case in f["cases"] for side, pair in case["sides"].items()
    ]  # fmt: skip
    print(tabulate(rows, ("model", "dtype", "", "size", "side", "times faster than dense")))


if __name__ == "__main__":
    main()
