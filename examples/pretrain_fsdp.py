"""Pretrain a Llama with SLoPe on many processes: FSDP2, from the meta device to a checkpoint.

torchrun --standalone --nproc-per-node 2 examples/pretrain_fsdp.py --out runs/fsdp

The same file runs on a laptop (two processes, CPU, gloo) and on a cluster (CUDA, nccl). Started
again with the same OUT, at any number of processes, it goes on from the last checkpoint. So it can
run under ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts 3``, and as a requeued job.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoints import delete_all_but, keep_arguments, latest_of_ranks
from text_data import ROWS, Batches, add_arguments, mapped_rows, prepare_rows
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

import slope_fx

FREE_TO_CHANGE = ("save_every", "out", "replicas", "prompt", "prepare_only")  # when a run goes on


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)

    def option(name: str, default: Any, text: str) -> None:
        text = f"{text} (default: {default})"
        parser.add_argument(name, default=default, type=type(default), help=text)

    option("--layers", 4, "transformer blocks")
    option("--width", 256, "hidden size")
    option("--heads", 4, "attention heads")
    option("--context", 256, "tokens in a row")
    option("--dropout", 0.0, "dropout in attention")
    option("--sparsity", "2:4", "N:M pattern of all layers")
    option("--adapter-rank", 16, "rank of the adapters")
    option("--adapter-start", 0.9, "fraction of the steps before the adapters; 0.99 in long runs")
    option("--backward-mask-interval", 100, "steps between refreshes of backward masks")
    option("--steps", 250, "optimizer steps")
    option("--batch-size", 12, "rows in a step, of all ranks together")
    option("--lr", 2e-3, "peak learning rate")
    option("--warmup", 20, "steps of learning-rate warm-up")
    option("--clip", 1.0, "gradient norm to clip at")
    option("--seed", 0, "random seed")
    option("--device", "cuda" if torch.cuda.is_available() else "cpu", "device")
    option("--backend", "inductor", "torch.compile backend")
    option("--replicas", 1, "HSDP: groups of ranks that each hold all shards, such as nodes")
    option("--save-every", 50, "steps between checkpoints")
    option("--out", "runs/fsdp", "folder of the run, which all ranks reach")
    option("--prompt", "HAMLET.\n", "what the sample begins with")
    parser.add_argument(
        "--prepare-only", action="store_true", help="tokenise the text into OUT, without torchrun"
    )
    return parser.parse_args()


class Run:
    """One training run, of which this process is a rank."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        check_launch()
        self.device, backend = torch.device(args.device), "gloo"
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        if os.environ["RANK"] == "0":
            prepare_rows(args, self.out)
        while not (self.out / ROWS).exists():
            # Not in a collective, which would give up after half an hour.
            time.sleep(1.0)
        dist.init_process_group(backend)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if args.batch_size % self.world or self.world % args.replicas:
            raise SystemExit(f"{self.world} ranks don't divide --batch-size, or into --replicas.")
        if self.rank == 0:
            keep_arguments(self.out, vars(args), FREE_TO_CHANGE)
        dist.barrier()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.out / "tokenizer")
        self.batches = Batches(mapped_rows(self.out), args.batch_size, args.seed)
        self.model = self._make_model()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, args.lr, (0.9, 0.95), weight_decay=0.1)
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.schedule = slope_fx.Schedule(
            self.model, args.steps, args.adapter_start, args.backward_mask_interval
        )
        # DCP and not save_pretrained(training=...), because a rank then writes its own shards and
        # sends nothing, and its metadata are written last: a folder that has them is whole.
        self.state = slope_fx.checkpoints.TrainingState(
            self.model, self.optimizer, self.schedule, rates=self.rates
        )
        found = [latest_of_ranks(self.out)]
        dist.broadcast_object_list(found)  # one answer for all
        if found[0] is not None:
            dcp.load({"training": self.state}, checkpoint_id=found[0])
            print(f"Rank {self.rank} of {self.world} goes on from {found[0]}.", flush=True)

    def _make_model(self) -> LlamaForCausalLM:
        args = self.args
        config = LlamaConfig(
            vocab_size=len(self.tokenizer), num_hidden_layers=args.layers, hidden_size=args.width,
            intermediate_size=128 * math.ceil(args.width * 8 / 3 / 128),
            num_attention_heads=args.heads, max_position_embeddings=args.context,
            attention_dropout=args.dropout, bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        slope_fx.compile(
            model, args.sparsity, adapter_rank=args.adapter_rank or None, backend=args.backend
        )
        shape = (args.replicas, self.world // args.replicas)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
        mesh = mesh if args.replicas > 1 else mesh["shard"]
        cuda = self.device.type == "cuda"
        half = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if cuda else {}
        for block in (*model.model.layers, model):
            fully_shard(block, mesh=mesh, **half)
        model.to_empty(device=self.device)
        # On CUDA, DTensor draws one stream of numbers for all shards; on a CPU, each for itself.
        torch.manual_seed(args.seed + (0 if cuda else mesh.get_local_rank("shard")))
        model.init_weights()  # chooses the masks too
        set_seed(args.seed + 1 + self.rank)  # each rank has its own dropout
        return model

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        warmup = max(1, self.args.warmup)
        progress = max(0, step - warmup) / max(1, self.args.steps - warmup)
        return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))

    def train(self) -> None:
        """Take the steps that are left."""
        args, phase = self.args, self.schedule.phase
        self.model.train()
        log = (self.out / "log.jsonl").open("a") if self.rank == 0 else None
        while (step := self.schedule.last_step) < args.steps:
            ids = self.batches.at(step, slice(self.rank, None, self.world)).to(self.device)
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.rates.step()
            self.schedule.step()
            mean = loss.detach() / self.world
            dist.all_reduce(mean)
            line = {"step": step + 1, "loss": mean.item(), "phase": phase, "ranks": self.world}
            for file in (log, None) if log else ():
                # Steps that are taken again after a restart are in the log again.
                print(json.dumps(line), file=file, flush=True)
            phase = self.schedule.phase
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                path = self.out / f"checkpoint-{step + 1:06d}"
                dcp.save({"training": self.state}, checkpoint_id=path)
                if self.rank == 0:
                    delete_all_but(path, self.out)

    def finish(self) -> None:
        """Save the model for one process, and let it write a text there."""
        slope_fx.save_pretrained(self.model, self.out / "model", tokenizer=self.tokenizer)
        dist.destroy_process_group()
        if self.rank > 0:
            return
        model = slope_fx.load_pretrained(self.out / "model", device=self.device)
        ids = self.tokenizer(self.args.prompt, return_tensors="pt").input_ids.to(self.device)
        with torch.compiler.set_stance("force_eager"):
            written = model.generate(ids, attention_mask=ids * 0 + 1, max_length=self.args.context)
        (self.out / "sample.txt").write_text(self.tokenizer.decode(written[0]))


def check_launch() -> None:
    """Check that torchrun has started this process, and can start it again."""
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("Start this file with torchrun --nproc-per-node N.")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0":
        # torchrun's own store keeps the addresses of ranks that died, and new ranks wait for them.
        raise SystemExit("--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.")


def main() -> None:
    args = parse_arguments()
    if args.prepare_only:
        prepare_rows(args, Path(args.out))
        return
    run = Run(args)
    run.train()
    run.finish()


if __name__ == "__main__":
    main()
