"""Write docs/gpu.md from benchmarks/results/gpu.json, which `make gpu` writes on a GPU.

make readme
"""

import json
from typing import Any

from make_results import ROOT, speedup, table

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
PAGE = ROOT / "docs" / "gpu.md"
PRODUCTS = {
    "sparse_linear": "forward",
    "sparse_input_grad": "input gradient",
    "sparse_weight_grad": "weight gradient",
}

INTRODUCTION = """\
# What was measured on a GPU

Written by `make readme` from `benchmarks/results/gpu.json`, which `make gpu` writes. 2:4 in bf16.
Results were checked first; each figure is from the medians of runs taken in turns, each with a
cold L2 cache; above 1 the sparse side is faster, and where it is slower the tables say so.
"""


def page(result: dict[str, Any]) -> str:
    """The whole page."""
    sections = [
        device(result), kernels(result), decoding(result), products(result),
        blocks(result),
    ]  # fmt: skip
    if result["wrong"]:
        sections.append("Wrong, and so not timed: " + " ".join(result["wrong"]))
    if result["left_out"]:
        sections.append("Left out for lack of time: " + "; ".join(result["left_out"]) + ".")
    return INTRODUCTION + "\n" + "\n\n".join(sections) + "\n"


def device(result: dict[str, Any]) -> str:
    gpu, versions = result["gpu"], result["versions"]
    lines = (
        f"{gpu.get('gpu', result['device'])}; torch {versions['torch']}, triton {gpu['triton']}, "
        f"CUDA {gpu.get('cuda', 'none')}; {result['date']}, at {result['commit'] or 'no commit'}. "
        f"A large copy moves {gpu['copy_bytes_per_second'] / 1e9:.0f} GB/s, a large dense product "
        f"runs at {gpu['product_flops_per_second'] / 1e12:.0f} TFLOP/s."
    )
    tests = result["tests"]
    if tests:
        passed = tests["tests"] - tests["failures"] - tests["errors"] - tests["skipped"]
        lines += f" Of {tests['tests']} tests {passed} passed, {tests['skipped']} were skipped."
    return lines


def width(entry: dict[str, Any]) -> str:
    return f"{entry['d_in']} to {entry['d_out']}"


def kernels(result: dict[str, Any]) -> str:
    by_size: dict[str, dict[str, float]] = {}
    for entry in result["kernels"]:
        by_size.setdefault(width(entry), {})[entry["kernel"]] = entry["of_copy_bandwidth"]
    names = list(dict.fromkeys(entry["kernel"] for entry in result["kernels"]))
    rows = [(size, *(f"{found[n]:.2f}" for n in names)) for size, found in by_size.items()]
    return "\n".join([
        "## Kernels bound by memory", "",
        "The bytes that each must move, at the speed of the copy, over its time: 1 is a copy's "
        "speed.", "", table(rows, ("width", *names)),
    ])  # fmt: skip


def decoding(result: dict[str, Any]) -> str:
    tokens = sorted({entry["tokens"] for entry in result["decoding"]})
    by_size: dict[str, dict[int, str]] = {}
    for entry in result["decoding"]:
        by_size.setdefault(width(entry), {})[entry["tokens"]] = speedup(entry)
    rows = [(size, *(found.get(t, "") for t in tokens)) for size, found in by_size.items()]
    return "\n".join([
        "## Decoding products by batch", "",
        "The Triton engine against cuBLAS; in brackets what half of the pairs lie between.", "",
        table(rows, ("width", *(f"{t} rows" for t in tokens))),
    ])  # fmt: skip


def products(result: dict[str, Any]) -> str:
    engines = list(dict.fromkeys(e for entry in result["products"] for e in entry["engines"]))
    rows = [
        (
            width(entry), PRODUCTS[entry["product"]], f"{entry['dense_of_peak']:.2f}",
            *(speedup(found) if (found := entry["engines"].get(e)) else "" for e in engines),
        )
        for entry in result["products"]
    ]  # fmt: skip
    return "\n".join([
        "## Products for many tokens", "",
        f"{result['arguments']['tokens']} tokens, each engine against cuBLAS; `auto` takes the "
        "fastest (cuSPARSELt's operand is made before, here). The dense product's own part of the "
        "peak is beside them.", "",
        table(rows, ("width", "product", "dense, of peak", *engines)),
    ])  # fmt: skip


def blocks(result: dict[str, Any]) -> str:
    rows = []
    for entry in result["blocks"]:
        state, extra = entry["state_bytes"], entry["activation_bytes"]
        rows.append((
            entry["model"],
            *(speedup(entry[kind]) for kind in ("training", "inference", "one_token")),
            f"{state['sparse'] / state['dense']:.3f}",
            f"{extra['sparse'] / extra['dense']:.3f}" if extra["dense"] else "",
        ))  # fmt: skip
    headers = ("block", "training step", "forward pass", "one token", "state", "peak of a step")
    return "\n".join([
        "## One transformer block", "",
        "Against `torch.compile` of the dense block with the same AdamW, "
        f"{result['arguments']['tokens']} tokens; the last two columns are bytes, sparse over "
        "dense: weights, masks and moments (small embeddings and head included), and what a step "
        "takes at its peak beyond that, gradients included.", "",
        table(rows, headers),
    ])  # fmt: skip


def main() -> None:
    if not RESULTS.exists():
        print(f"There is no {RESULTS.relative_to(ROOT)}: nothing was measured on a GPU yet.")
        return
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
