"""The Triton engine on a GPU: kernels, products, decoding, a transformer block; one file.

Every operation is held against its floor (the bytes it must move at the speed of a large copy,
or its operations at the speed of a large dense product, both measured first) and against the
dense product of the vendor; a block against ``torch.compile`` of the dense one. Results are
checked before anything is timed. Runs take turns, each with a cold L2 cache; medians.

    python benchmarks/gpu.py    # about five minutes on one GPU
    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu    # tiny: does it still run?
"""

import copy
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import torch
from common import agree, compare, parser, write
from devices import (
    DTYPE,
    Bench,
    Runs,
    device_of,
    expanded,
    extra_bytes,
    forward_pass,
    state_bytes,
    stepper,
)
from shapes import MODELS, shapes, sizes_of
from tabulate import tabulate
from torch import Tensor, nn

import slope_fx
from slope_fx.kernels import ENGINES
from slope_fx.kernels.packing import unpack
from slope_fx.kernels.triton import Triton, interpreted

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from traffic import bytes_per_weight

N, M = 2, 4
plain, triton = ENGINES["dense"], Triton()
DECODING_TOKENS = (1, 4, 16, 64)
PRODUCT_ENGINES = ("triton", "triton-dense", "cusparselt")
BLOCKS = ("OPT-6.6B", "LLaMA-3-8B", "OPT-13B")
"""The blocks, the most telling first, until time is up."""


def layer(bench: Bench, d_in: int, d_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A dense weight, and the same compressed: values and both masks."""
    weight = bench.normal(d_out, d_in)
    forward = triton.magnitude_mask(weight, N, M)
    values = triton.compress(weight, forward, N, M)
    return weight, values, forward, triton.backward_mask(values, forward, N, M)


def kernels(bench: Bench, d_in: int, d_out: int) -> Iterator[dict[str, Any]]:
    """What is bound by memory: seconds, and the part of a copy's bandwidth that it reaches."""
    if not bench.in_time(f"kernels {d_in} to {d_out}"):
        return
    weight, values, forward, backward = layer(bench, d_in, d_out)
    some = slice(0, 16 * M)  # rows, for the check
    want = plain.magnitude_mask(weight[some], N, M)
    _same(forward[some], want, "magnitude_mask")
    _same(values[some], plain.compress(weight[some], want, N, M), "compress")
    _same(backward[some], plain.backward_mask(values[some], want, N, M), "backward_mask")
    dense = triton.expand(values, forward, N, M)
    _same(dense[some], plain.expand(values[some], want, N, M), "expand")
    twice = triton.expand_twice_pruned(values, forward, backward, N, M)
    want = plain.expand_twice_pruned(values[some], want, backward[some], N, M)
    _same(twice[some], want, "expand_twice_pruned")
    runs: Runs = {
        "magnitude_mask": lambda: triton.magnitude_mask(weight, N, M),
        "backward_mask": lambda: triton.backward_mask(values, forward, N, M),
        "compress": lambda: triton.compress(weight, forward, N, M),
        "expand": lambda: triton.expand(values, forward, N, M),
    }
    for name, seconds in bench.medians(runs).items():
        each = sum(bytes_per_weight(name, DTYPE.itemsize, N, M))
        yield {
            "kernel": name, "d_in": d_in, "d_out": d_out, "seconds": seconds,
            "bytes_per_weight": each,
            "of_copy_bandwidth": each * d_in * d_out / bench.bytes_per_second / seconds,
        }  # fmt: skip


def _same(got: Tensor, want: Tensor, what: str) -> None:
    if not torch.equal(got, want):
        raise SystemExit(f"{what}: not what the dense engine computes; nothing timed.")


def decoding(bench: Bench, d_in: int, d_out: int) -> Iterator[dict[str, Any]]:
    """The product for a few tokens against cuBLAS, both from a cold cache."""
    weight, values, forward, _ = layer(bench, d_in, d_out)
    w = plain.expand(values, forward, N, M).double()
    for tokens in DECODING_TOKENS:
        if not bench.in_time(f"decoding {d_in} to {d_out}, {tokens} tokens"):
            continue
        x = bench.normal(tokens, d_in)
        runs: Runs = {
            "dense": lambda x=x: nn.functional.linear(x, weight),
            "sparse": lambda x=x: triton.sparse_linear(x, values, forward, None, N, M),
        }
        off = agree(runs["sparse"](), x.double() @ w.t(), f"decoding {d_in} to {d_out}", 2e-2)
        result = compare(bench.seconds(runs), "dense", "sparse")
        traffic = d_in * d_out * sum(bytes_per_weight("linear", DTYPE.itemsize, N, M))
        yield {
            "d_in": d_in, "d_out": d_out, "tokens": tokens, "difference": off,
            "of_copy_bandwidth": traffic / bench.bytes_per_second / result["sparse_seconds"],
            **result,
        }  # fmt: skip


def products(bench: Bench, d_in: int, d_out: int, tokens: int) -> Iterator[dict[str, Any]]:
    """The three products for many tokens, by each engine, against cuBLAS.

    What cuSPARSELt makes of the weight is kept, as under gradient accumulation.
    """
    if not bench.in_time(f"products {d_in} to {d_out}"):
        return
    weight, values, forward, backward = layer(bench, d_in, d_out)
    x, grad = bench.normal(tokens, d_in), bench.normal(tokens, d_out)
    some = slice(0, 64)  # tokens, or outputs, for the check
    w = plain.expand(values, forward, N, M).double()
    twice = values.masked_fill(~unpack(backward, values.shape[1]), 0)
    w2 = plain.expand(twice, forward, N, M).double()
    dw = plain.compress((grad.double().t()[some] @ x.double()), forward[some], N, M)
    cases: dict[str, tuple[Callable[[], Tensor], Tensor, tuple[Any, ...]]] = {
        "sparse_linear": (
            lambda x=x, w=weight: nn.functional.linear(x, w), x[some].double() @ w.t(),
            (x, values, forward, None, N, M)),
        "sparse_input_grad": (
            lambda g=grad, w=weight: g @ w, grad[some].double() @ w2,
            (grad, values, forward, backward, N, M)),
        "sparse_weight_grad": (
            lambda g=grad, x=x: g.t() @ x, dw, (grad, x, forward, N, M)),
    }  # fmt: skip
    floor = 2 * tokens * d_in * d_out / bench.flops_per_second
    for name, (dense, want, arguments) in cases.items():
        runs: Runs = {"dense": dense}
        engines = [e for e in ENGINES if e in PRODUCT_ENGINES and able(e, name, bench.device)]
        with patch.dict(os.environ, SLOPE_FX_KEEP_OPERANDS="1"):
            for engine in engines:
                operation = getattr(ENGINES[engine], name)
                runs[engine] = lambda operation=operation, a=arguments: operation(*a)
                agree(runs[engine]()[some], want, f"{name} {d_in} to {d_out} by {engine}", 2e-2)
            seconds = bench.seconds(runs)
        yield {
            "product": name, "d_in": d_in, "d_out": d_out, "tokens": tokens,
            "dense_of_peak": floor / statistics.median(seconds["dense"]),
            "engines": {e: compare(seconds, "dense", e) for e in engines},
        }  # fmt: skip


def able(engine: str, product: str, device: torch.device) -> bool:
    """Whether an engine has a way of its own to compute a product on this device."""
    if engine == "cusparselt" and product == "sparse_weight_grad":
        return False
    return not ENGINES[engine].why_not(device, DTYPE)


def blocks(bench: Bench, name: str, tokens: int, backend: str) -> Iterator[dict[str, Any]]:
    """A training step, a forward pass and peak memory, against the compiled dense block."""
    if not bench.in_time(f"block of {name}"):
        return
    torch._dynamo.reset()
    with torch.device(bench.device):
        dense = sizes_of(name).build(1, 1024, tokens).to(DTYPE)
    sparse = slope_fx.compile(copy.deepcopy(dense), f"{N}:{M}", skip_first=False, backend=backend)
    plain_model = expanded(dense, sparse)
    ids = torch.randint(0, 1024, (1, tokens), device=bench.device)
    with torch.no_grad():
        want = plain_model(input_ids=ids).logits
        agree(sparse(input_ids=ids).logits, want, f"block of {name}", 5e-2)
    del plain_model, want
    dense.compile(backend=backend)
    models = {"dense": dense, "sparse": sparse}
    training = {kind: stepper(model, ids) for kind, model in models.items()}
    inference = {kind: forward_pass(model, ids) for kind, model in models.items()}
    token = {kind: forward_pass(model, ids[:, :1]) for kind, model in models.items()}
    for run in training.values():
        run()
        run()
    # One token is a matter of launches, so both sides have CUDA graphs without gradients.
    with torch._inductor.config.patch("triton.cudagraphs", bench.device.type == "cuda"):
        for run in (*inference.values(), *token.values()):
            for _ in range(3):
                run()
    yield {
        "model": name, "tokens": tokens,
        "training": compare(bench.seconds(training), "dense", "sparse"),
        "inference": compare(bench.seconds(inference), "dense", "sparse"),
        "one_token": compare(bench.seconds(token), "dense", "sparse"),
        "state_bytes": {kind: state_bytes(model) for kind, model in models.items()},
        "activation_bytes": {kind: extra_bytes(bench, training[kind]) for kind in models},
        "explain": slope_fx.explain(sparse).to_dict(),
    }  # fmt: skip


def outcomes(path: Path | None) -> dict[str, int] | None:
    """How many tests ran, failed, broke and were skipped, by a junit file."""
    if path is None:
        return None
    if not path.exists():
        print(f"--tests {path}: there is no such file; did the tests run out of time?")
        return {"tests": 0, "failures": 0, "errors": 1, "skipped": 0}
    (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
    return {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--seconds", type=float, default=300, help="start nothing after these")
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--tests", type=Path, help="junit file of tests, to go into the results")
    arguments.add_argument("--tokens", type=int, default=2048)
    args = arguments.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu" and not interpreted():
        raise SystemExit("--device cpu needs TRITON_INTERPRET=1 in the environment.")
    if reason := triton.why_not(device, DTYPE):
        raise SystemExit(f"--device {args.device}: the Triton engine can't serve: {reason}.")
    if device.type == "cpu":  # the same code on the smallest sizes
        os.environ["SLOPE_FX_ENGINES"] = "triton"
        sizes, names, args.tokens, args.rounds, backend = [(16, 32)], ["tiny"], 8, 2, "eager"
    else:
        sizes, names, backend = shapes(list(MODELS)), list(BLOCKS), "inductor"
    torch.manual_seed(0)
    bench = Bench(device, args.seconds, args.rounds)
    tests = outcomes(args.tests)
    del args.tests
    found: dict[str, list[dict[str, Any]]] = {}
    sections: list[tuple[str, float, Callable[..., Any], list[Any]]] = [
        ("decoding", 0.25, decoding, sizes),
        ("kernels", 0.4, kernels, sizes),
        ("blocks", 0.7, blocks, [(name, args.tokens, backend) for name in names]),
        ("products", 1.0, products, [(*size, args.tokens) for size in sizes]),
    ]
    for name, share, each, cases in sections:
        found[name] = bench.section(share, each, cases)
        done = {**{section: [] for section, *_ in sections}, **found}
        write(  # after each, so that none is lost
            "gpu", args, gpu=device_of(bench), tests=tests, left_out=bench.left_out,
            wrong=bench.wrong, **done,
        )  # fmt: skip
    rows = [
        (r["kernel"], f"{r['d_in']} to {r['d_out']}", f"{r['of_copy_bandwidth']:.2f}")
        for r in found["kernels"]
    ]
    print(tabulate(rows, ("kernel", "width", "of copy bandwidth")))
    rows = [
        (r["tokens"], f"{r['d_in']} to {r['d_out']}", f"{r['speedup']:.2f}")
        for r in found["decoding"]
    ]
    print(tabulate(rows, ("tokens", "width", "times faster")))
    for r in found["blocks"]:
        print(r["model"], {k: round(r[k]["speedup"], 3) for k in ("training", "inference")})
    if bench.wrong:
        raise SystemExit("\n".join(bench.wrong))
    if tests and tests["failures"] + tests["errors"]:
        raise SystemExit(f"Of the tests before, some failed: {tests}.")


if __name__ == "__main__":
    main()
