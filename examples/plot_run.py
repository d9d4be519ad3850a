"""Plot the loss of one or more runs from their ``log.json``, with the phases marked.

python examples/plot_run.py runs/gpt2/log.json runs/gpt2-dense/log.json --out loss.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(logs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the training loss, the held-out loss and the adapter phase of each run.

    Args:
        logs: the logs by the name to show.
        path: the PNG to write.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for index, (name, log) in enumerate(logs.items()):
        colour = f"C{index}"
        steps = log["steps"]
        axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], color=colour, alpha=0.25)
        smooth = _moving_average([s["loss"] for s in steps])
        axes.plot([s["step"] for s in steps], smooth, color=colour, label=f"{name}, training")
        evaluations = log["evaluations"]
        axes.plot(
            [e["step"] for e in evaluations], [e["loss"] for e in evaluations], "o--",
            color=colour, label=f"{name}, held out",
        )  # fmt: skip
        switch = next((s["step"] for s in steps if s["phase"] == "adapter"), None)
        if switch is not None:
            axes.axvspan(switch, steps[-1]["step"], color=colour, alpha=0.12, lw=0)
            axes.annotate(
                "adapter phase", (switch, 1), xycoords=("data", "axes fraction"), va="top",
                rotation=90, ha="right", fontsize=8, xytext=(-2, -4), textcoords="offset points",
            )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _moving_average(values: list[float], weight: float = 0.9) -> list[float]:
    averages, total = [], 0.0
    for count, value in enumerate(values, 1):
        total = weight * total + (1 - weight) * value
        averages.append(total / (1 - weight**count))  # else the first value would weigh too much
    return averages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("logs", nargs="+", type=Path, help="log.json of each run")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    args = parser.parse_args()
    logs = {}
    for path in args.logs:
        log = json.loads(path.read_text())
        logs[log["name"]] = log
    plot(logs, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
