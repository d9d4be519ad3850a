"""docs/gpu.md and docs/paper.md: what a GPU measured, what a roofline allows, what is in memory."""

from .common import (
    Result,
    mib,
    page,
    pivot,
    ratio,
    read,
    read_if_there,
    section,
    speedup,
    table,
    taken,
)  # fmt: skip

PRODUCTS = {
    "sparse_linear": "forward",
    "sparse_input_grad": "input gradient",
    "sparse_weight_grad": "weight gradient",
}

GPU_INTRODUCTION = """\
# Results on a GPU

`make readme` writes this page from `benchmarks/results/gpu.json`, which `make gpu` writes. 2:4 in
bf16. The results were checked first. The two sides run in turns, each with a cold L2 cache. Each
speed-up is the ratio of the medians: above 1 the sparse side is faster, below 1 it is slower.
"""

PAPER_INTRODUCTION = """\
# The paper's table

`make readme` writes this page from files in `benchmarks/results`. The paper's figures are those of
SLoPe (arXiv 2405.16325), on an A100-40GB.

![Speed-ups: measured, at most, and as the paper reports them](paper.png)
"""


# --- docs/gpu.md ---------------------------------------------------------------------------


def gpu() -> str | None:
    """The page, or None where nothing was measured on a GPU."""
    result = read_if_there("gpu")
    return None if result is None else gpu_page(result)


def gpu_page(result: Result) -> str:
    return page(
        GPU_INTRODUCTION, device(result), kernels(result), decoding(result), products(result),
        blocks(result), notes(result),
    )  # fmt: skip


def device(result: Result) -> str:
    gpu, versions, tests = result["gpu"], result["versions"], result["tests"]
    lines = (
        f"{gpu.get('gpu', result['device'])}; torch {versions['torch']}, triton {gpu['triton']}, "
        f"CUDA {gpu.get('cuda', 'none')}; {result['date']}, at {result['commit'] or 'no commit'}. "
        f"A large copy moves {gpu['copy_bytes_per_second'] / 1e9:.0f} GB/s, a large dense product "
        f"runs at {gpu['product_flops_per_second'] / 1e12:.0f} TFLOP/s."
    )
    if tests:
        passed = tests["tests"] - tests["failures"] - tests["errors"] - tests["skipped"]
        lines += f" Of {tests['tests']} tests {passed} passed, {tests['skipped']} were skipped."
    return lines


def width(entry: Result) -> str:
    return f"{entry['d_in']} to {entry['d_out']}"


def kernels(result: Result) -> str:
    names, rows = pivot(
        result["kernels"], width, lambda e: e["kernel"], lambda e: f"{e['of_copy_bandwidth']:.2f}"
    )
    return section(
        "Kernels bound by memory",
        "The bytes that each kernel must move, at the speed of a copy, over its time: 1 is the "
        "speed of a copy.",
        table([(size, *cells) for size, cells in rows.items()], ("width", *names)),
    )


def decoding(result: Result) -> str:
    entries = sorted(result["decoding"], key=lambda e: e["tokens"])
    tokens, rows = pivot(entries, width, lambda e: e["tokens"], speedup)
    sizes = dict.fromkeys(map(width, result["decoding"]))
    return section(
        "Decoding products by batch",
        "The Triton engine against cuBLAS. The range in brackets holds half of the paired ratios.",
        table([(size, *rows[size]) for size in sizes], ("width", *(f"{t} rows" for t in tokens))),
    )


def products(result: Result) -> str:
    engines = list(dict.fromkeys(e for entry in result["products"] for e in entry["engines"]))
    rows = [
        (
            width(entry), PRODUCTS[entry["product"]], f"{entry['dense_of_peak']:.2f}",
            *(speedup(found) if (found := entry["engines"].get(e)) else "" for e in engines),
        )
        for entry in result["products"]
    ]  # fmt: skip
    return section(
        "Products for many tokens",
        f"{result['arguments']['tokens']} tokens, each engine against cuBLAS. `auto` takes the "
        "fastest engine. cuSPARSELt's operand is made beforehand. The third column is the dense "
        "product's part of the peak.",
        table(rows, ("width", "product", "dense, of peak", *engines)),
    )


def blocks(result: Result) -> str:
    rows = [
        (
            entry["model"],
            *(speedup(entry[kind]) for kind in ("training", "inference", "one_token")),
            ratio(entry["state_bytes"]), ratio(entry["activation_bytes"]),
        )
        for entry in result["blocks"]
    ]  # fmt: skip
    headers = ("block", "training step", "forward pass", "one token", "state", "peak of a step")
    return section(
        "One transformer block",
        "Against `torch.compile` of the dense block with the same AdamW, "
        f"{result['arguments']['tokens']} tokens. The last two columns are bytes, sparse over "
        "dense. State: weights, masks and moments, with small embeddings and a head. Peak of a "
        "step: the memory that a step takes beyond the state, gradients included.",
        table(rows, headers),
    )


def notes(result: Result) -> str:
    """What was not timed, and why."""
    lines = []
    if result["left_out"]:
        lines.append(f"Left out for lack of time: {'; '.join(result['left_out'])}.")
    if result["wrong"]:
        lines.append("Wrong, and so not timed: " + " ".join(result["wrong"]))
    return "\n\n".join(lines)


# --- docs/paper.md -------------------------------------------------------------------------


def paper() -> str:
    dry, result = read("paper_dry_run"), read_if_there("paper")
    return page(
        PAPER_INTRODUCTION,
        "No GPU has measured any of this yet. `make gpu` does." if result is None
        else paper_measured(result, dry["paper"]),
        paper_limits(dry, dry["paper"]),
        paper_state(read("state"), dry, dry["paper"]),
    )  # fmt: skip


def percent(rank: float) -> str:
    return f"{100 * rank:.2f}%".replace("0.00%", "0")


def paper_measured(result: Result, reported: Result) -> str:
    rows = []
    for e in result["entries"]:
        theirs = reported[e["model"]][e["kind"]]
        if isinstance(theirs, list):
            theirs = theirs[result["ranks"].index(e["rank"])]
        rows.append((
            e["model"] if e["whole"] else f"{e['model']}, {e['layers']} blocks",
            "training" if e["kind"] == "training" else
            f"inference, r = {percent(e['rank'])}{', operands kept' if e['kept'] else ''}",
            speedup(e), f"{e['predicted']:.2f}", f"{theirs:.2f}", ratio(e["memory"], 2),
            speedup(e["peer"]) if e.get("peer") else e.get("peer_refusal", ""),
        ))  # fmt: skip
    gpu = result["gpu"]
    return section(
        "Measured",
        f"{gpu.get('gpu', result['device'])}; torch {result['versions']['torch']}, triton "
        f"{gpu['triton']}, cuSPARSELt {gpu.get('cusparselt') or 'none'}; {result['date']}, at "
        f"{result['commit'] or 'no commit'}. 'At most' is the roofline for the copy and product "
        "speeds of this device. The range in brackets holds half of the paired ratios. Memory is "
        "the peak.",
        table(rows, ("model", "", "times faster", "at most", "paper", "memory", "PyTorch's 2:4")),
        notes(result),
    )


def paper_limits(dry: Result, reported: Result) -> str:
    rows = [
        (
            e["model"], f"{e['training_flops'] / 1e15:.2f}", f"{e['training']:.2f}",
            f"{reported[e['model']]['training']:.2f}",
            *(f"{mine:.2f} ({theirs:.2f})" for mine, theirs in
              zip(e["inference"], reported[e["model"]]["inference"], strict=True)),
        )
        for e in dry["models"]
    ]  # fmt: skip
    arguments = dry["arguments"]
    return section(
        "Upper bounds",
        f"Operations and bytes of whole models, {arguments['batch'] * arguments['context']} tokens "
        f"a step, under ceilings of {arguments['tflops']:g} TFLOP/s and {arguments['gbps']:g} "
        "GB/s, those of an A100-40GB. The engine is ideal. Sparse tensor cores are twice as fast "
        "as dense ones. A sparse product is then at most 2 times faster. A step with two sparse "
        "products of three is at most 1.5 times faster. The paper's figures are in brackets. "
        "`python benchmarks/paper.py --dry-run --tflops T --gbps B` computes the table for another "
        "device.",
        table(rows, (
            "model", "PFLOP a step", "training, at most", "paper",
            *(f"inference, r = {percent(rank)}" for rank in dry["ranks"]))),
    )  # fmt: skip


def paper_state(result: Result, dry: Result, reported: Result) -> str:
    blocks = [
        (m["model"], m["state"], mib(m["dense"]["pruned"]), mib(m["sparse"]["pruned"]),
         f"{m['ratio']:.4f}")
        for m in result["measured"]
    ]  # fmt: skip
    kinds, models = pivot(
        result["whole"], lambda e: e["model"], lambda e: e["state"], lambda e: f"{e['ratio']:.3f}"
    )
    by_name = {e["model"]: e["state"] for e in dry["models"]}
    rows = [
        (name, *ratios,
         f"{by_name[name]['bf16']['with_operands']:.3f}", reported[name]["memory"][0],
         f"{by_name[name]['inference']['ratio']:.3f}",
         f"{by_name[name]['inference']['with_operands']:.3f}", reported[name]["memory"][1])
        for name, ratios in models.items()
    ]  # fmt: skip
    return section(
        "Memory that lives from step to step",
        f"Counted on live tensors after a step, {result['arguments']['layers']} blocks of each "
        "family at full width: weights, masks, gradients and Adam's moments of the pruned linears.",
        table(blocks, ("blocks of", "state", "dense, MiB", "SLoPe, MiB", "ratio")),
        "The same for whole models, computed from their sizes, embeddings and head included. "
        "Kept cuSPARSELt operands take more: two operands of 9/16 of the dense 16-bit weight "
        "between two steps under gradient accumulation, one operand at inference with "
        "`SLOPE_FX_KEEP_OPERANDS=1`. The paper's figures are of its own peak, with "
        "activations.",
        table(rows, (
            "model", *kinds, "bf16, operands kept", "paper, training",
            "bf16 inference", "operands kept", "paper, inference")),
        f"({taken(result)})",
    )  # fmt: skip
