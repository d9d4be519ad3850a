"""Write the README's table and figures from the committed results.

    make readme

The results come from ``make train`` and ``make train-dense`` (their log.json) and from
``make bench``; ``--runs DIR`` takes the first two from a folder of runs into
``benchmarks/results`` before it writes.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

import slope_fx

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = {"gpt2": "train_sparse.json", "gpt2-dense": "train_dense.json"}

sys.path.insert(0, str(ROOT / "examples"))
from plot_run import plot  # noqa: E402


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return result


def explain_block(sparse: dict[str, Any]) -> str:
    """The table of ``explain``, as ``make train`` printed it."""
    return f"```\n{slope_fx.Explanation.from_dict(sparse['linears'])}\n```"


def figures_block(sparse: dict[str, Any], dense: dict[str, Any], step: dict[str, Any]) -> str:
    """What the runs and the benchmark measured, losses beside gains."""
    size, low_high = step["arguments"], step["ratio_quartiles"]
    state, medians = step["state_bytes"], step["median_seconds"]
    rows = [
        (
            "state of the pruned linears (weights, gradients, Adam's moments), MiB",
            *_pair(state, "pruned_linears", 2**20),
        ),
        ("the same for the whole model, embeddings included, MiB", *_pair(state, "model", 2**20)),
        (
            "peak resident memory of the process in a step, MiB",
            *(f"{step['peak_resident_bytes'][name] / 2**20:.0f}" for name in ("dense", "sparse")),
            f"{step['peak_resident_bytes']['sparse'] / step['peak_resident_bytes']['dense']:.3f}",
        ),
        (
            "a training step, s",
            f"{medians['dense']:.2f}",
            f"{medians['sparse']:.2f}",
            f"{step['ratio_of_medians']:.2f}",
        ),
    ]
    table = tabulate(rows, ("", "dense", "SLoPe 2:4", "ratio"), "github", disable_numparse=True)
    first, last = sparse["evaluations"][0], sparse["evaluations"][-1]
    dense_last = dense["evaluations"][-1]
    seconds = {
        name: statistics.median(s["seconds"] for s in run["steps"])
        for name, run in (("sparse", sparse), ("dense", dense))
    }
    return "\n".join(
        [
            f"GPT-2 of {size['layers']} layers and width {size['width']}, "
            f"{size['rows'] * size['context']} tokens a step, fp32, against `torch.compile` of the "
            f"dense model with the same AdamW, interleaved in one run ({step['device']}, "
            f"{step['threads']} threads, torch {step['versions']['torch']}; medians of "
            f"{size['steps']} steps; half of the paired step ratios lie between "
            f"{low_high[0]:.2f} and {low_high[2]:.2f}):",
            "",
            table,
            "",
            "The state shrinks as the method says. The peak also holds activations, logits and the "
            "libraries themselves, which SLoPe leaves as they are. The step is slower than dense, "
            "not faster, until there are kernels for sparse products. (`make bench`, "
            "`benchmarks/results/training_step.json`.)",
            "",
            f"On `make train` ({last['step']} steps, {sparse['parameters'] / 1e6:.1f} M trained "
            f"parameters, dense {dense['parameters'] / 1e6:.1f} M) held-out perplexity falls from "
            f"{first['perplexity']:.0f} to {last['perplexity']:.1f}, that of the same run dense "
            f"(`make train-dense`) to {dense_last['perplexity']:.1f}. One short run each, at one "
            "learning rate: they show that both learn, not which is better. A step takes "
            f"{seconds['sparse']:.2f} s, dense {seconds['dense']:.2f} s.",
        ]
    )


def _pair(sizes: dict[str, dict[str, int]], what: str, unit: int) -> tuple[str, str, str]:
    dense, sparse = sizes["dense"][what], sizes["sparse"][what]
    return f"{dense / unit:.1f}", f"{sparse / unit:.1f}", f"{sparse / dense:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=Path, help="folder of the runs to take results from")
    args = parser.parse_args()
    if args.runs:
        for run, name in RUNS.items():
            log = json.loads((args.runs / run / "log.json").read_text())
            (RESULTS / name).write_text(json.dumps(log, separators=(",", ":")) + "\n")
    sparse, dense = read("train_sparse.json"), read("train_dense.json")
    blocks = {
        "explain": explain_block(sparse),
        "figures": figures_block(sparse, dense, read("training_step.json")),
    }
    readme = (ROOT / "README.md").read_text()
    for name, text in blocks.items():
        marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        readme = marked.sub(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", readme)
    (ROOT / "README.md").write_text(readme)
    plot({run["name"]: run for run in (sparse, dense)}, ROOT / "docs" / "loss.png")


if __name__ == "__main__":
    main()
