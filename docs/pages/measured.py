"""The README's figures, and docs/results.md: what was measured on a CPU."""

import statistics

from slope_fx.report import Explanation

from . import distributed
from .common import (
    DOCS,
    ROOT,
    Result,
    filled,
    mib,
    page,
    pivot,
    ratio,
    read,
    section,
    speedup,
    table,
    taken,
)

PRODUCTS = ("forward", "input gradient", "weight gradient")
SHOWN_LINEARS = 5
MEMORY = {
    "pruned_linears": "state of the pruned linears (weights, gradients, Adam's moments)",
    "model": "the same for the whole model, with its embeddings",
    "peak_resident": "peak resident memory of the process in a step",
}

INTRODUCTION = """\
# Results on a CPU

`make readme` writes this page from the files in `benchmarks/results`. `make bench` writes those
files, in two hours on two cores. The dense side is `torch.compile` with the same dtype and
optimizer. The two sides run in turns in one process, after a check of the results. Each speed-up
is the ratio of the medians, dense over sparse: above 1 the sparse side is faster, below 1 it is
slower. The range in brackets holds half of the paired ratios.
"""


# --- README.md, docs/index.md -------------------------------------------------------------


def readme() -> str:
    blocks = {"figures": figures_block(), "explain": explain_block(read("training_step"))}
    return filled((ROOT / "README.md").read_text(), blocks)


def index() -> str:
    return filled((DOCS / "index.md").read_text(), {"figures": figures_block()})


def explain_block(step: Result) -> str:
    """The first rows of ``explain`` for the model of the training step, after it ran."""
    lines = str(Explanation.from_dict(step["explain"])).splitlines()
    end = lines.index("")
    return "\n".join(["```text", *lines[: 2 + SHOWN_LINEARS], "...", *lines[end:], "```"])


def figures_block() -> str:
    """Three figures, each from one results file."""
    step, decoding, memory = read("training_step"), read("decoding"), read("memory")
    size, training = step["arguments"], step["runs"]["float32"]["steps"]["2:4"]
    written, linears = decoding["decoding"]["float32"], MEMORY["pruned_linears"]
    linear_bytes = {side: memory["bytes"][side]["pruned_linears"] for side in ("dense", "sparse")}
    millions = f"{decoding['parameters'] / 1e6:.0f}"
    rows = [
        (
            f"training step, GPT-2 of {size['layers']} layers and width {size['width']}",
            f"{training['dense_seconds']:.2f} s", f"{training['sparse_seconds']:.2f} s",
            f"{training['speedup']:.2f}x faster",
        ),
        (
            f"`generate`, one sequence, GPT-2 of {millions} M parameters",
            f"{written['dense_tokens_per_second']:.1f} tokens/s",
            f"{written['sparse_tokens_per_second']:.1f} tokens/s",
            f"{written['speedup']:.2f}x faster",
        ),
        (
            linears, *(f"{mib(linear_bytes[side])} MiB" for side in ("dense", "sparse")),
            f"{ratio(linear_bytes)} of dense",
        ),
    ]  # fmt: skip
    return (
        table(rows, ("2:4, fp32", "dense", "SLoPe", ""))
        + f"\n\n{step['device']}, {step['threads']} threads, torch {step['versions']['torch']}; "
        "the dense model runs under `torch.compile`."
    )


# --- docs/results.md -----------------------------------------------------------------------


def results() -> str:
    return page(
        INTRODUCTION,
        products_section(read("products")),
        step_section(read("training_step")),
        decoding_section(read("decoding")),
        memory_section(read("memory")),
        distributed.bytes_section(read("distributed")),
        distributed.memory_section(read("distributed_memory")),
        distributed.plan_section(read("plan")),
        run_section(read("train_sparse"), read("train_dense")),
    )


def products_section(result: Result) -> str:
    columns, rows = pivot(
        result["products"],
        lambda e: (e["dtype"], e["pattern"], f"{e['d_in']} to {e['d_out']}"),
        lambda e: e["product"],
        speedup,
    )
    assert tuple(columns) == PRODUCTS
    return section(
        "Products",
        f"{result['arguments']['tokens']} tokens. The input gradient includes the refresh of the "
        f"compressed transpose. {taken(result)}",
        table([(*case, *cells) for case, cells in rows.items()],
                  ("dtype", "N:M", "width", *columns)),
        "![Speed of the products against dense](products.png)",
    )  # fmt: skip


def step_section(result: Result) -> str:
    size = result["arguments"]
    steps, parts = [], []
    for dtype, run in result["runs"].items():
        label = dtype + (" autocast" if dtype != "float32" else "")
        for pattern, step in run["steps"].items():
            seconds = (f"{step[f'{side}_seconds']:.2f}" for side in ("dense", "sparse"))
            steps.append((label, pattern, *seconds, speedup(step)))
        for name, made_of in run["breakdown"].items():
            parts.append((dtype, name, *(f"{seconds:.2f}" for seconds in made_of.values())))
    names = list(result["runs"]["float32"]["breakdown"]["dense"])
    return section(
        "A training step",
        f"GPT-2 of {size['layers']} layers, width {size['width']}, vocabulary "
        f"{size['vocab_size']}, {size['rows']} x {size['context']} tokens, AdamW, fp32 "
        f"weights. {taken(result)}",
        table(steps, ("dtype", "N:M", "dense s", "sparse s", "times faster")),
        "The parts of one profiled step, in seconds. In the sparse models the dense products are "
        "the head and the first block's QKV:",
        table(parts, ("dtype", "model", *names)),
        "![The parts of a step](training_step.png)",
    )


def decoding_section(result: Result) -> str:
    rows = [
        (
            dtype, *(f"{e[f'{side}_tokens_per_second']:.1f}" for side in ("dense", "sparse")),
            speedup(e),
        )
        for dtype, e in result["decoding"].items()
    ]  # fmt: skip
    return section(
        "Decoding",
        f"`generate`, one sequence, GPT-2 of {result['parameters'] / 1e6:.0f} M parameters at "
        f"2:4, {result['arguments']['tokens']} tokens after a prompt of "
        f"{result['arguments']['prompt']}. {taken(result)}",
        table(rows, ("dtype", "dense tokens/s", "sparse tokens/s", "times faster")),
    )


def memory_section(result: Result) -> str:
    rows = []
    for key, title in MEMORY.items():
        sides = {side: result["bytes"][side][key] for side in ("dense", "sparse")}
        rows.append((title, mib(sides["dense"]), mib(sides["sparse"]), ratio(sides)))
    return section(
        "Memory",
        f"The training step above at {result['arguments']['sparsity']}, fp32, MiB. The peak also "
        "holds activations, logits and the libraries, which SLoPe leaves as they are. "
        f"{taken(result)}",
        table(rows, ("", "dense", "sparse", "ratio")),
    )


def run_section(sparse: Result, dense: Result) -> str:
    rows = []
    for name, run in (("`make train`, 2:4", sparse), ("`make train-dense`", dense)):
        first, last = run["evaluations"][0], run["evaluations"][-1]
        seconds = statistics.median(step["seconds"] for step in run["steps"])
        rows.append((
            name, f"{run['parameters'] / 1e6:.1f} M", f"{first['perplexity']:.0f}",
            f"{last['perplexity']:.1f}", f"{seconds:.2f}",
        ))  # fmt: skip
    steps = sparse["evaluations"][-1]["step"]
    return section(
        "A short training run",
        f"A small GPT-2 on Shakespeare, {steps} steps. Each run was made once, at one learning "
        "rate. The runs show that both models learn. They do not show which model is better.",
        table(rows, ("", "trained parameters", "held-out perplexity before", "after",
                         "a step, s")),
        "![Loss of both runs](loss.png)",
    )  # fmt: skip
