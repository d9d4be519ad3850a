"""Write docs/results.md and its plots from the files in benchmarks/results.

make readme
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
PRODUCTS = ("forward", "input gradient", "weight gradient")

INTRODUCTION = """\
# What was measured

Written by `make readme` from the files in `benchmarks/results`, which `make bench` writes. Each
figure is a ratio of medians, dense over sparse, of runs taken in turns in one process, after the
results were checked; above 1 the sparse side is faster. Half of the paired ratios lie in the
range given. The dense side is `torch.compile` in the same dtype and with the same optimizer.
Where the engine is slower than dense, the table says so just as it says where it is faster.
"""


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def table(rows: Iterable[Iterable[Any]], headers: Iterable[str]) -> str:
    return tabulate(list(rows), list(headers), "github", disable_numparse=True)


def taken(result: dict[str, Any]) -> str:
    """Where and when a result was taken."""
    return (
        f"{result['device']}, {result['threads']} threads, torch {result['versions']['torch']}, "
        f"{result['date']}, at {result['commit']}."
    )


def speedup(entry: dict[str, Any]) -> str:
    low, high = entry["speedup_quartiles"]
    return f"**{entry['speedup']:.2f}** ({low:.2f} to {high:.2f})"


def products_section(result: dict[str, Any]) -> str:
    by_case: dict[tuple[str, str, int, int], dict[str, str]] = {}
    for entry in result["products"]:
        case = (entry["dtype"], entry["pattern"], entry["d_in"], entry["d_out"])
        by_case.setdefault(case, {})[entry["product"]] = speedup(entry)
    rows = [
        (dtype, pattern, f"{d_in} to {d_out}", *(found[product] for product in PRODUCTS))
        for (dtype, pattern, d_in, d_out), found in by_case.items()
    ]
    return "\n".join(
        [
            "## Products",
            "",
            f"{result['arguments']['tokens']} tokens; the input gradient includes the refresh of "
            f"the compressed transpose. {taken(result)}",
            "",
            table(rows, ("dtype", "N:M", "width", *PRODUCTS)),
            "",
            "![Speed of the products against dense](products.png)",
        ]
    )


def step_section(result: dict[str, Any]) -> str:
    size = result["arguments"]
    rows = [
        (
            dtype + (" autocast" if dtype != "float32" else ""),
            pattern,
            f"{step['dense_seconds']:.2f}",
            f"{step['sparse_seconds']:.2f}",
            speedup(step),
        )
        for dtype, run in result["runs"].items()
        for pattern, step in run["steps"].items()
    ]
    parts = [
        (dtype, name, *(f"{seconds:.2f}" for seconds in made_of.values()))
        for dtype, run in result["runs"].items()
        for name, made_of in run["breakdown"].items()
    ]
    names = list(result["runs"]["float32"]["breakdown"]["dense"])
    return "\n".join(
        [
            "## A training step",
            "",
            f"GPT-2 of {size['layers']} layers, width {size['width']}, vocabulary "
            f"{size['vocab_size']}, {size['rows']} x {size['context']} tokens, AdamW, fp32 "
            f"weights. {taken(result)}",
            "",
            table(rows, ("dtype", "N:M", "dense s", "sparse s", "times faster")),
            "",
            "What one profiled step is made of, in seconds. In the sparse models the dense "
            "products are the head and the first block's QKV:",
            "",
            table(parts, ("dtype", "model", *names)),
            "",
            "![What a step is made of](training_step.png)",
        ]
    )


def decoding_section(result: dict[str, Any]) -> str:
    rows = [
        (
            dtype,
            f"{entry['dense_tokens_per_second']:.1f}",
            f"{entry['sparse_tokens_per_second']:.1f}",
            speedup(entry),
        )
        for dtype, entry in result["decoding"].items()
    ]
    return "\n".join(
        [
            "## Decoding",
            "",
            f"`generate`, one sequence, GPT-2 of {result['parameters'] / 1e6:.0f} M parameters at "
            f"2:4, {result['arguments']['tokens']} tokens after a prompt of "
            f"{result['arguments']['prompt']}. {taken(result)}",
            "",
            table(rows, ("dtype", "dense tokens/s", "sparse tokens/s", "times faster")),
        ]
    )


def memory_section(result: dict[str, Any]) -> str:
    dense, sparse = result["bytes"]["dense"], result["bytes"]["sparse"]
    titles = {
        "pruned_linears": "state of the pruned linears (weights, gradients, Adam's moments)",
        "model": "the same for the whole model, embeddings included",
        "peak_resident": "peak resident memory of the process in a step",
    }
    rows = [
        (title, f"{dense[key] / 2**20:.0f}", f"{sparse[key] / 2**20:.0f}",
         f"{sparse[key] / dense[key]:.3f}")
        for key, title in titles.items()
    ]  # fmt: skip
    return "\n".join(
        [
            "## Memory",
            "",
            f"The training step above at {result['arguments']['sparsity']}, fp32, MiB. "
            f"{taken(result)}",
            "",
            table(rows, ("", "dense", "sparse", "ratio")),
        ]
    )


def page() -> str:
    """The whole page."""
    sections = [
        products_section(read("products")),
        step_section(read("training_step")),
        decoding_section(read("decoding")),
        memory_section(read("memory")),
    ]
    return INTRODUCTION + "\n" + "\n\n".join(sections) + "\n"


def plot_products(result: dict[str, Any], path: Path) -> None:
    groups = sorted({(e["dtype"], e["pattern"]) for e in result["products"]}, reverse=True)
    figure, axes = plt.subplots(
        1, len(groups), figsize=(3.4 * len(groups), 3.2), sharey=True, layout="constrained"
    )
    for axis, (dtype, pattern) in zip(axes, groups, strict=True):
        entries = [e for e in result["products"] if (e["dtype"], e["pattern"]) == (dtype, pattern)]
        sizes = list(dict.fromkeys((e["d_in"], e["d_out"]) for e in entries))
        for i, product in enumerate(PRODUCTS):
            heights = [e["speedup"] for e in entries if e["product"] == product]
            places = [place + 0.27 * (i - 1) for place in range(len(sizes))]
            axis.bar(places, heights, 0.25, label=product)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(f"{dtype}, {pattern}", fontsize=10)
        axis.set_xticks(range(len(sizes)), [f"{a}\nto {b}" for a, b in sizes], fontsize=7)
    axes[0].set_ylabel("times faster than dense")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_step(result: dict[str, Any], path: Path) -> None:
    bars = [
        (f"{name}\n{dtype}", made_of)
        for dtype, run in result["runs"].items()
        for name, made_of in run["breakdown"].items()
    ]
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    below = [0.0] * len(bars)
    for part in bars[0][1]:
        heights = [made_of[part] for _, made_of in bars]
        axis.bar(range(len(bars)), heights, 0.6, bottom=below, label=part)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axis.set_xticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axis.set_ylabel("seconds a step")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    PAGE.write_text(page())
    plot_products(read("products"), ROOT / "docs" / "products.png")
    plot_step(read("training_step"), ROOT / "docs" / "training_step.png")


if __name__ == "__main__":
    main()
