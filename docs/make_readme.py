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


def explain_block(step: dict[str, Any]) -> str:
    """The table of ``explain`` for the model of the training step, once it had run."""
    return f"```\n{slope_fx.Explanation.from_dict(step['explain'])}\n```"


def figures_block(
    sparse: dict[str, Any],
    dense: dict[str, Any],
    step: dict[str, Any],
    decoding: dict[str, Any],
    memory: dict[str, Any],
) -> str:
    """What the runs and the benchmarks measured, losses beside gains."""
    size, steps = step["arguments"], step["runs"]
    rows = [
        *(
            (
                f"a training step at {pattern}, {label}, s",
                f"{entry['dense_seconds']:.2f}",
                f"{entry['sparse_seconds']:.2f}",
                f"{entry['speedup']:.2f}x faster",
            )
            for dtype, label in (("float32", "fp32"), ("bfloat16", "bf16 autocast"))
            for pattern, entry in steps[dtype]["steps"].items()
        ),
        *(
            (
                f"`generate`, one sequence, {parameters(decoding)}, {label}, tokens/s",
                f"{entry['dense_tokens_per_second']:.1f}",
                f"{entry['sparse_tokens_per_second']:.1f}",
                f"{entry['speedup']:.2f}x faster",
            )
            for label, entry in zip(("fp32", "bf16"), decoding["decoding"].values(), strict=True)
        ),
        *(
            (
                what,
                *(f"{memory['bytes'][name][key] / 2**20:.0f}" for name in ("dense", "sparse")),
                f"{memory['bytes']['sparse'][key] / memory['bytes']['dense'][key]:.3f} of dense",
            )
            for key, what in (
                (
                    "pruned_linears",
                    "state of the pruned linears (weights, gradients, Adam's moments), MiB",
                ),
                ("model", "the same for the whole model, embeddings included, MiB"),
                ("peak_resident", "peak resident memory of the process in a step, MiB"),
            )
        ),
    ]
    table = tabulate(rows, ("", "dense", "SLoPe", ""), "github", disable_numparse=True)
    first, last = sparse["evaluations"][0], sparse["evaluations"][-1]
    dense_last = dense["evaluations"][-1]
    seconds = {
        name: statistics.median(s["seconds"] for s in run["steps"])
        for name, run in (("sparse", sparse), ("dense", dense))
    }
    return "\n".join(
        [
            f"GPT-2 of {size['layers']} layers and width {size['width']}, "
            f"{size['rows'] * size['context']} tokens a step, against `torch.compile` of the dense "
            f"model with the same AdamW, in turns in one run ({step['device']}, {step['threads']} "
            f"threads, torch {step['versions']['torch']}; medians; 2:4 unless it says otherwise):",
            "",
            table,
            "",
            "[docs/results.md](docs/results.md) has the rest: every product by shape, pattern and "
            "dtype, where the engine loses too, the spread, and what a step is made of. The state "
            "shrinks as the method says; the peak also holds activations, logits and the libraries "
            "themselves, which SLoPe leaves as they are. `make bench` measures all of it anew, in "
            "half an hour.",
            "",
            f"On `make train` ({last['step']} steps, {sparse['parameters'] / 1e6:.1f} M trained "
            f"parameters, dense {dense['parameters'] / 1e6:.1f} M) held-out perplexity falls from "
            f"{first['perplexity']:.0f} to {last['perplexity']:.1f}, that of the same run dense "
            f"(`make train-dense`) to {dense_last['perplexity']:.1f}. One short run each, at one "
            "learning rate: they show that both learn, not which is better. A step takes "
            f"{seconds['sparse']:.2f} s, dense {seconds['dense']:.2f} s.",
        ]
    )


def parameters(decoding: dict[str, Any]) -> str:
    return f"{decoding['parameters'] / 1e6:.0f} M parameters"


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
        "explain": explain_block(read("training_step.json")),
        "figures": figures_block(
            sparse, dense, *(read(f"{n}.json") for n in ("training_step", "decoding", "memory"))
        ),
    }
    readme = (ROOT / "README.md").read_text()
    for name, text in blocks.items():
        marked = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        readme = marked.sub(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", readme)
    (ROOT / "README.md").write_text(readme)
    plot({run["name"]: run for run in (sparse, dense)}, ROOT / "docs" / "loss.png")


if __name__ == "__main__":
    main()
