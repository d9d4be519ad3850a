"""Write docs/paper.md and its plot from the files in benchmarks/results.

Those are paper_dry_run.json and state.json, which need no GPU, and paper.json, once one was there.

make readme
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from make_results import RESULTS, ROOT, read, speedup, table, taken

PAGE = ROOT / "docs" / "paper.md"
PLOT = ROOT / "docs" / "paper.png"
MEASURED = RESULTS / "paper.json"

INTRODUCTION = """\
# The paper's table

Written by `make readme` from files in `benchmarks/results`. The paper's figures are those of SLoPe
(arXiv 2405.16325), on an A100-40GB.

![Speed-ups: measured, at most, and as the paper reports them](paper.png)
"""


def percent(rank: float) -> str:
    return f"{100 * rank:.2f}%".replace("0.00%", "0")


def on_paper(dry: dict[str, Any], paper: dict[str, Any]) -> str:
    ranks = dry["ranks"]
    rows = [
        (
            e["model"], f"{e['training_flops'] / 1e15:.2f}", f"{e['training']:.2f}",
            f"{paper[e['model']]['training']:.2f}",
            *(f"{mine:.2f} ({theirs:.2f})" for mine, theirs in
              zip(e["inference"], paper[e["model"]]["inference"], strict=True)),
        )
        for e in dry["models"]
    ]  # fmt: skip
    arguments = dry["arguments"]
    return "\n".join([
        "## What could be gained", "",
        f"Operations and bytes of whole models, {arguments['batch'] * arguments['context']} tokens "
        f"a step, under ceilings of {arguments['tflops']:g} TFLOP/s and {arguments['gbps']:g} GB/s "
        "(an A100-40GB's): an ideal engine, sparse tensor cores twice as fast as dense ones. A "
        "sparse product is then at most 2 times faster, a step with two of its three products "
        "sparse 1.5. `python benchmarks/paper.py --dry-run --tflops T --gbps B` computes it for "
        "another device. In brackets what the paper reports.", "",
        table(rows, (
            "model", "PFLOP a step", "training, at most", "paper",
            *(f"inference, r = {percent(rank)}" for rank in ranks))),
    ])  # fmt: skip


def state(result: dict[str, Any], dry: dict[str, Any], paper: dict[str, Any]) -> str:
    mib = 2**20
    blocks = [
        (m["model"], m["state"], f"{m['dense']['pruned'] / mib:.0f}",
         f"{m['sparse']['pruned'] / mib:.0f}", f"{m['ratio']:.4f}")
        for m in result["measured"]
    ]  # fmt: skip
    models: dict[str, dict[str, float]] = {}
    for entry in result["whole"]:
        models.setdefault(entry["model"], {})[entry["state"]] = entry["ratio"]
    by_name = {e["model"]: e["state"] for e in dry["models"]}
    rows = [
        (name, *(f"{ratio:.3f}" for ratio in found.values()),
         f"{by_name[name]['bf16']['with_operands']:.3f}", paper[name]["memory"][0],
         f"{by_name[name]['inference']['ratio']:.3f}",
         f"{by_name[name]['inference']['with_operands']:.3f}", paper[name]["memory"][1])
        for name, found in models.items()
    ]  # fmt: skip
    kinds = list(next(iter(models.values())))
    return "\n".join([
        "## What lives from step to step", "",
        f"Counted on live tensors, {result['arguments']['layers']} blocks of each family at full "
        "width, after a step: the pruned linears' weights, masks, gradients, Adam's moments.", "",
        table(blocks, ("blocks of", "state", "dense, MiB", "SLoPe, MiB", "ratio")), "",
        "What that makes of whole models, embeddings and head included, by their sizes. Where "
        "cuSPARSELt's operands are kept beside the values (two of 9/16 of the dense 16-bit weight "
        "between two steps, under gradient accumulation; one at inference, if "
        "`SLOPE_FX_KEEP_OPERANDS=1` says so), it is more, as told. The paper's figures are of its "
        "own peak, activations included.", "",
        table(rows, (
            "model", *kinds, "the latter, operands kept", "paper, training",
            "bf16 inference", "operands kept", "paper, inference")), "",
        f"({taken(result)})",
    ])  # fmt: skip


def measured(result: dict[str, Any], paper: dict[str, Any]) -> str:
    rows = []
    for e in result["entries"]:
        reported = paper[e["model"]][e["kind"]]
        if isinstance(reported, list):
            reported = reported[result["ranks"].index(e["rank"])]
        memory = e["memory"]
        rows.append((
            e["model"] if e["whole"] else f"{e['model']}, {e['layers']} blocks",
            "training" if e["kind"] == "training" else
            f"inference, r = {percent(e['rank'])}{', operands kept' if e['kept'] else ''}",
            speedup(e), f"{e['predicted']:.2f}", f"{reported:.2f}",
            f"{memory['sparse'] / memory['dense']:.2f}" if memory["dense"] else "",
            speedup(e["peer"]) if e.get("peer") else e.get("peer_refusal", ""),
        ))  # fmt: skip
    gpu = result["gpu"]
    notes = [f"Left out for lack of time: {'; '.join(result['left_out'])}."] * bool(
        result["left_out"]
    ) + ["Wrong, and so not timed: " + " ".join(result["wrong"])] * bool(result["wrong"])
    return "\n".join([
        "## What was measured", "",
        f"{gpu.get('gpu', result['device'])}; torch {result['versions']['torch']}, triton "
        f"{gpu['triton']}, cuSPARSELt {gpu.get('cusparselt') or 'none'}; {result['date']}, at "
        f"{result['commit'] or 'no commit'}. 'At most' is the roofline for this device's own copy "
        "and product; in brackets what half of the pairs lie between; memory is at the peak.", "",
        table(rows, (
            "model", "", "times faster", "at most", "paper", "memory", "PyTorch's 2:4")),
        *notes,
    ])  # fmt: skip


def page() -> str:
    """The whole page."""
    dry = read("paper_dry_run")
    parts = [INTRODUCTION]
    if MEASURED.exists():
        parts.append(measured(json.loads(MEASURED.read_text()), dry["paper"]))
    else:
        parts.append("Nothing of this was measured on a GPU yet: `make gpu` does.")
    parts += [on_paper(dry, dry["paper"]), state(read("state"), dry, dry["paper"])]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def plot(dry: dict[str, Any], result: dict[str, Any] | None, path: Path) -> None:
    """Bars for each model: measured, if it was, the roofline's limit, the paper's."""
    names = [e["model"] for e in dry["models"]]
    figure, axes = plt.subplots(2, 1, figsize=(8, 5), layout="constrained", sharex=True)
    for axis, kind in zip(axes, ("training", "inference"), strict=True):

        def first(value: Any) -> float:
            return value[0] if isinstance(value, list) else value

        series = {
            "at most (roofline)": {e["model"]: first(e[kind]) for e in dry["models"]},
            "paper (A100)": {name: first(dry["paper"][name][kind]) for name in names},
        }
        if result is not None:
            series["measured"] = {
                e["model"]: e["speedup"] for e in result["entries"]
                if e["kind"] == kind and not e["rank"]
            }  # fmt: skip
        for i, (label, values) in enumerate(series.items()):
            offsets = [x + (i - (len(series) - 1) / 2) * 0.27 for x in range(len(names))]
            axis.bar(offsets, [values.get(name, 0) for name in names], 0.25, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel(f"{kind},\ntimes faster")
        axis.set_xticks(range(len(names)), names, rotation=20)
    axes[0].legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    PAGE.write_text(page())
    result = json.loads(MEASURED.read_text()) if MEASURED.exists() else None
    plot(read("paper_dry_run"), result, PLOT)


if __name__ == "__main__":
    main()
