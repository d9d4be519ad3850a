"""Write the figures of docs/checkpoints.md and docs/pretrained.md from benchmarks/results.

make readme
"""

import re
from pathlib import Path
from typing import Any

from make_results import read, table

DOCS = Path(__file__).resolve().parent


def kills() -> str:
    """What became of the run that was killed again and again."""
    result = read("kill_and_resume")
    return (
        f"A run of {result['steps']} steps that got a SIGKILL at {result['kills']} random moments "
        f"({result['kills_in_sparse_phase']} in the sparse phase, "
        f"{result['kills_in_adapter_phase']} in the adapter phase), while it started, computed or "
        "wrote, and went on from its last checkpoint each time, ended with the weights, masks, "
        "optimizer state, random states and losses of a run that was never killed, bit for bit "
        "(`benchmarks/kill_and_resume.py`)."
    )


def smollm() -> str:
    """Perplexities of the variants of SmolLM2."""
    result = read("finetune_smollm")
    rows = []
    for variant, found in result["variants"].items():
        mask, _, adapter = variant.partition("/")
        rows.append((mask, adapter, _figure(found, "untrained"), _figure(found, "trained")))
    order = ("dense", "magnitude", "wanda")
    starts = ("", "none", "zero", "svd", "eora")
    rows.sort(key=lambda row: (order.index(row[0]), starts.index(row[1])))
    headers = ("mask", "adapters from", "no training", f"after {result['steps']} steps")
    return (
        f"Perplexity on {result['held_out_tokens']:,} tokens of Hamlet and Macbeth, "
        f"{result['model']} in fp32, {result['sparsity']}, rank {result['rank']}, "
        f"{result['calibration_tokens']:,} calibration tokens and {result['steps']} steps of "
        f"{result['tokens_per_step']:,} tokens of the other plays:\n\n"
        + table(rows, headers)
        + "\n\nOne run each, short, at one learning rate; the dense model learns the plays too. "
        "Adapters from EoRA begin below those from SVD, and these below none, and so they end; the "
        "poorer the mask, the more they restore."
    )


def _figure(found: dict[str, Any], key: str) -> str:
    return f"{found[key]:.1f}" if key in found else ""


BLOCKS = {"checkpoints.md": {"kills": kills}, "pretrained.md": {"smollm": smollm}}


def filled(page: str) -> str:
    """A page with its blocks as the results are now."""
    text = (DOCS / page).read_text()
    for name, make in BLOCKS[page].items():
        text = re.sub(
            f"<!-- {name} -->.*?<!-- /{name} -->",
            lambda _, name=name, make=make: f"<!-- {name} -->\n{make()}\n<!-- /{name} -->",
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    for page in BLOCKS:
        (DOCS / page).write_text(filled(page))
