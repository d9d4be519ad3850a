"""Pretrain a GPT-2 with SLoPe: N:M-sparse weights, and adapters in the last steps.

The part that makes it sparse is one call of ``slope_fx.compile`` and one ``Schedule``;
``--dense`` leaves both out, with everything else equal.
"""

import argparse
import json
import math
import os
import platform
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import (
    check_folder,
    delete_run,
    keep_arguments,
    latest,
    load_dense,
    load_tokenizer,
    load_training,
    save,
)
from plot_run import plot
from text_data import Batches, add_arguments, load_text, pack, train_tokenizer
from torch import nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import slope_fx

EXAMPLES = """examples:
  python examples/pretrain_gpt2.py                              Shakespeare, 2:4, a few minutes
  python examples/pretrain_gpt2.py --dense --out runs/dense     the same, dense
  python examples/pretrain_gpt2.py --resume                     go on after an interruption
  python examples/pretrain_gpt2.py --text-files 'books/*.txt'   your own text
  python examples/pretrain_gpt2.py --dataset Salesforce/wikitext --dataset-config wikitext-2-raw-v1
  python examples/pretrain_gpt2.py --sparsity 2:8 --adapter-rank 0.0625 --layers 12 --width 768 \\
      --heads 12 --vocab-size 32000 --context 1024 --steps 20000 --device cuda --dtype bfloat16
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)

    def option(group: Any, name: str, default: Any, text: str, **more: Any) -> None:
        if "choices" not in more:
            more["type"] = type(default)
        group.add_argument(name, default=default, help=f"{text} (default: {default})", **more)

    model = parser.add_argument_group("model")
    option(model, "--layers", 4, "transformer blocks")
    option(model, "--width", 256, "hidden size")
    option(model, "--heads", 4, "attention heads")
    option(model, "--context", 256, "tokens in a row")
    option(model, "--dropout", 0.0, "dropout")
    sparse = parser.add_argument_group("SLoPe")
    sparse.add_argument("--dense", action="store_true", help="the baseline: no SLoPe at all")
    option(sparse, "--sparsity", "2:4", "N:M pattern of all layers")
    option(sparse, "--adapter-rank", 0.0625, "rank, or fraction of a layer's width; 0: no adapters")
    option(
        sparse, "--adapter-start", 0.9,
        "fraction of the steps before the adapters; the paper's 0.99 is for long runs",
    )  # fmt: skip
    option(sparse, "--mask", "magnitude", "how weights are chosen", choices=["magnitude", "random"])
    option(sparse, "--backward-mask-interval", 100, "steps between refreshes of backward masks")
    training = parser.add_argument_group("training")
    option(training, "--steps", 250, "optimizer steps")
    option(training, "--batch-size", 8, "rows in a step")
    option(training, "--lr", 2e-3, "peak learning rate")
    option(training, "--warmup", 20, "steps of learning-rate warm-up")
    option(training, "--weight-decay", 0.1, "weight decay of matrices")
    option(training, "--clip", 1.0, "gradient norm to clip at")
    option(training, "--eval-every", 100, "steps between evaluations")
    option(training, "--eval-rows", 64, "held-out rows to evaluate on")
    option(training, "--seed", 0, "random seed")
    option(training, "--device", "cuda" if torch.cuda.is_available() else "cpu", "device")
    option(
        training, "--dtype", "float32", "compute type; weights stay float32 (autocast)",
        choices=["float32", "bfloat16"],
    )  # fmt: skip
    option(training, "--backend", "inductor", "torch.compile backend")
    option(
        training, "--region", "blocks", "compile the blocks one by one or the whole model",
        choices=["blocks", "model"],
    )  # fmt: skip
    output = parser.add_argument_group("output")
    option(output, "--out", "runs/gpt2", "folder for checkpoint, log, plot and sample")
    option(output, "--save-every", 100, "steps between checkpoints")
    output.add_argument("--resume", action="store_true", help="go on from OUT's last checkpoint")
    output.add_argument("--overwrite", action="store_true", help="delete OUT's earlier run")
    option(output, "--prompt", "HAMLET.\n", "what the sample begins with")
    return parser.parse_args()


# What must not differ between a run and its resumption, and what may.
FREE_TO_CHANGE = ("resume", "overwrite", "save_every", "out", "prompt")


class Run:
    """One training run: its model, its log, and the loop."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out = Path(args.out)
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        checkpoint = self._prepare_folder()
        text = load_text(args)
        self.tokenizer = (
            load_tokenizer(checkpoint)
            if checkpoint
            else train_tokenizer(text["train"], args.vocab_size)
        )
        self.batches = Batches(
            pack(text["train"], self.tokenizer, args.context), args.batch_size, args.seed
        )
        self.held_out = pack(text["validation"], self.tokenizer, args.context)[: args.eval_rows]
        self.model = self._make_model(checkpoint)
        self.optimizer = self._make_optimizer()
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.schedule = (
            None
            if args.dense
            else slope_fx.Schedule(
                self.model, args.steps, args.adapter_start, args.backward_mask_interval
            )
        )
        self.step = 0
        self.log: dict[str, Any] = self._new_log()
        if checkpoint:
            self._resume(checkpoint)

    def _prepare_folder(self) -> Path | None:
        checkpoint = latest(self.out)
        if self.args.resume and checkpoint is None:
            raise SystemExit(f"--resume: {self.out} has no checkpoint to go on from.")
        if self.args.resume:
            keep_arguments(self.out, vars(self.args), FREE_TO_CHANGE)
            return checkpoint
        if checkpoint is not None and not self.args.overwrite:
            raise SystemExit(
                f"{self.out} holds a run already. Go on with it (--resume), delete it "
                "(--overwrite), or choose another folder (--out)."
            )
        if (self.out / "arguments.json").exists():
            delete_run(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        check_folder(self.out)
        keep_arguments(self.out, vars(self.args), FREE_TO_CHANGE)
        return None

    def _make_model(self, checkpoint: Path | None) -> GPT2LMHeadModel:
        args = self.args
        if checkpoint and not args.dense:
            model = slope_fx.load_pretrained(
                checkpoint, device=self.device, backend=args.backend, region=args.region
            )
            model.loss_type = "ForCausalLM"
            return model
        config = GPT2Config(
            vocab_size=len(self.tokenizer), n_layer=args.layers, n_embd=args.width,
            n_head=args.heads, n_positions=args.context, resid_pdrop=args.dropout,
            embd_pdrop=args.dropout, attn_pdrop=args.dropout,
            bos_token_id=self.tokenizer.bos_token_id, eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        model = GPT2LMHeadModel(config).to(self.device)
        model.loss_type = "ForCausalLM"
        if args.dense:
            if checkpoint:
                load_dense(checkpoint, model)
            blocks = model.transformer.h if args.region == "blocks" else [model]
            for block in blocks:
                block.compile(backend=args.backend)
            return model
        return slope_fx.compile(
            model,
            sparsity=args.sparsity,
            adapter_rank=_rank(args.adapter_rank),
            mask=args.mask,
            backend=args.backend,
            region=args.region,
        )

    def _make_optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.args.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.args.lr, betas=(0.9, 0.95))

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        warmup, total = self.args.warmup, self.args.steps
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total - warmup)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def _new_log(self) -> dict[str, Any]:
        return {
            "name": "dense" if self.args.dense else f"SLoPe {self.args.sparsity}",
            "arguments": vars(self.args),
            "versions": {
                "slope_fx": slope_fx.__version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "device": torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else platform.machine(),
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "linears": None if self.args.dense else slope_fx.explain(self.model).to_dict(),
            "steps": [],
            "evaluations": [],
        }

    def _parts(self) -> dict[str, Any]:
        parts = {"optimizer": self.optimizer, "rates": self.rates}
        return parts if self.schedule is None else {**parts, "schedule": self.schedule}

    def _resume(self, checkpoint: Path) -> None:
        state = load_training(checkpoint, self._parts())
        self.step, self.log = state["step"], state["log"]
        print(f"Going on from {checkpoint}, step {self.step}.")

    def train(self) -> None:
        """Take the steps that are left; evaluate, save and show progress on the way."""
        args = self.args
        phase = self.schedule.phase if self.schedule else "dense"
        self.model.train()
        bar = tqdm(total=args.steps, initial=self.step, unit="step", dynamic_ncols=True)
        if self.step == 0:
            self.evaluate(bar)
        while self.step < args.steps:
            started = time.perf_counter()
            ids = self.batches.at(self.step).to(self.device)
            loss = self._loss(ids)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            rate = self.rates.get_last_lr()[0]
            self.rates.step()
            if self.schedule:
                self.schedule.step()
            self.step += 1
            value = loss.item()
            seconds = time.perf_counter() - started
            self.log["steps"].append(
                {"step": self.step, "loss": value, "lr": rate, "phase": phase, "seconds": seconds}
            )
            bar.update()
            bar.set_postfix(loss=f"{value:.3f}", tokens_per_s=f"{ids.numel() / seconds:,.0f}")
            if self.schedule and self.schedule.phase != phase:
                phase = self.schedule.phase
                bar.write(f"step {self.step}: the {phase} phase begins (one recompile)")
            last = self.step == args.steps
            if last or self.step % args.eval_every == 0:
                self.evaluate(bar)
            if last or self.step % args.save_every == 0:
                self.save()
        bar.close()

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        half = torch.autocast(self.device.type, torch.bfloat16)
        with half if self.args.dtype == "bfloat16" else nullcontext():
            loss: torch.Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    @torch.no_grad()
    def evaluate(self, bar: tqdm) -> None:
        """Perplexity on the held-out rows."""
        self.model.eval()
        # Eagerly: graphs for evaluation would take longer to compile than they'd save here.
        with torch.compiler.set_stance("force_eager"):
            parts = self.held_out.split(self.args.batch_size)
            losses = [self._loss(ids.to(self.device)).item() * len(ids) for ids in parts]
        self.model.train()
        loss = sum(losses) / len(self.held_out)
        self.log["evaluations"].append(
            {"step": self.step, "loss": loss, "perplexity": math.exp(loss)}
        )
        bar.write(f"step {self.step}: held-out perplexity {math.exp(loss):.1f}")

    def save(self) -> None:
        """Write a checkpoint, the log and the plot."""
        parts = {**self._parts(), "step": self.step, "log": self.log}
        save(self.out, self.step, self.model, self.tokenizer, parts, dense=self.args.dense)
        partial = self.out / "log.json.partial"
        partial.write_text(json.dumps(self.log, indent=1))
        os.replace(partial, self.out / "log.json")
        plot({self.log["name"]: self.log}, self.out / "loss.png")

    @torch.no_grad()
    def sample(self, length: int = 120) -> str:
        """Text that the model writes after the prompt."""
        self.model.eval()
        ids = self.tokenizer(self.args.prompt, return_tensors="pt").input_ids.to(self.device)
        length = min(length, self.args.context - ids.shape[1])
        with torch.compiler.set_stance("force_eager"):
            written = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=True,
                top_k=40, temperature=0.8,
            )  # fmt: skip
        return str(self.tokenizer.decode(written[0]))


def _rank(rank: float) -> int | float | None:
    """``--adapter-rank`` as ``compile`` takes it: a whole number is a rank, 0 is none."""
    if rank == 0:
        return None
    return int(rank) if rank >= 1 and rank == int(rank) else rank


def main() -> None:
    args = parse_arguments()
    run = Run(args)
    print(f"{run.log['parameters'] / 1e6:.2f} M trained parameters, {run.log['name']}.")
    if not args.dense:
        print(slope_fx.explain(run.model))
    run.train()
    text = run.sample()
    (run.out / "sample.txt").write_text(text)
    print(f"\n{text}\n\nCheckpoint, log.json, loss.png and sample.txt are in {run.out}.")


if __name__ == "__main__":
    main()
