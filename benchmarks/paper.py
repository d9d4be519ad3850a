"""The paper's table: training and inference of seven models, speed and memory, against dense.

On a GPU each model's training step and forward pass are timed against ``torch.compile`` of the
dense model, in turns, with the same optimizer, after a check that the outputs agree: the whole
model where both sides fit into memory, else two blocks of it with a small vocabulary, as the paper
truncates. Inference also at adapter ranks of 1.56% and 6.25% of the hidden size, with operands kept
(SLOPE_FX_KEEP_OPERANDS=1), and beside PyTorch's own semi-structured tensors. Memory is what each
side needs at its peak.

    python benchmarks/paper.py              # all models; half an hour or so on one GPU
    python benchmarks/paper.py --quick      # two blocks of three models; eight minutes at most
    python benchmarks/paper.py --dry-run    # no GPU: operations, bytes, what a roofline predicts
    python benchmarks/paper.py --device cpu # tiny: does it still run? its figures mean nothing
"""

import argparse
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from arithmetic import (
    TENSOR_CORES,
    TWO_OF_THREE,
    Roofline,
    inference,
    inference_state,
    training,
    training_state,
)
from common import agree, compare, parser, write
from devices import DTYPE, Bench, Runs, device_of, extra_bytes, forward_pass, state_bytes, stepper
from shapes import MODELS, Architecture, sizes_of
from tabulate import tabulate
from torch import nn

import slope_fx

PATTERN = "2:4"
RANKS = (0.0, 0.0156, 0.0625)
TRUNCATED = 2
SMALL_VOCABULARY = 1024
QUICK = ("OPT-6.6B", "LLaMA-3-8B", "OPT-13B")

PAPER: dict[str, dict[str, Any]] = {
    "OPT-66B": {"training": 1.20, "inference": (1.46, 1.43, 1.40), "memory": (0.67, 0.63)},
    "OPT-30B": {"training": 1.22, "inference": (1.53, 1.53, 1.50), "memory": (0.67, 0.61)},
    "OPT-13B": {"training": 1.25, "inference": (1.54, 1.39, 1.36), "memory": (0.68, 0.51)},
    "OPT-6.6B": {"training": 1.21, "inference": (1.46, 1.46, 1.43), "memory": (0.68, 0.60)},
    "OPT-2.6B": {"training": 1.13, "inference": (1.31, 1.25, 1.18), "memory": (0.67, 0.62)},
    "LLaMA-3-8B": {"training": 1.16, "inference": (1.35, 1.33, 1.32), "memory": (0.63, 0.66)},
    "Mistral-7B": {"training": 1.15, "inference": (1.34, 1.32, 1.31), "memory": (0.68, 0.66)},
}
"""What the paper reports, on an A100-40GB; memory is training's and inference's."""


# --- on paper ------------------------------------------------------------------------------


def predicted(
    name: str, layers: int, tokens: int, context: int, roofline: Roofline
) -> dict[str, Any]:
    """Of a model in so many blocks: operations, bytes of state, and what the roofline allows."""
    sizes = sizes_of(name)
    step = training(sizes, layers, tokens, context)
    state = {
        "fp32": training_state(sizes, layers, 4, 4),
        "bf16": training_state(sizes, layers, 2, 4),
        "inference": inference_state(sizes, layers),
    }
    passes = {rank: inference(sizes, layers, tokens, context, rank) for rank in RANKS}
    return {
        "model": name, "layers": layers,
        "training_flops": sum(o.flops for o in step),
        "inference_flops": sum(o.flops for o in passes[0.0]),
        "training": roofline.dense(step) / roofline.sparse(step),
        "inference": [roofline.dense(p) / roofline.sparse(p) for p in passes.values()],
        "state": {
            kind: {
                "dense_bytes": s.dense, "sparse_bytes": s.sparse, "ratio": s.sparse / s.dense,
                "linears": s.linears, "operand_bytes": s.operands,
                "with_operands": (s.sparse + s.operands) / s.dense,
            }
            for kind, s in state.items()
        },
    }  # fmt: skip


def dry_run(args: argparse.Namespace) -> None:
    roofline = Roofline(args.tflops * 1e12, args.gbps * 1e9)
    tokens = args.batch * args.context
    entries = [
        predicted(name, sizes_of(name).layers, tokens, args.context, roofline)
        for name in args.models
    ]
    rows = [
        (
            e["model"], f"{e['training_flops'] / 1e15:.2f}",
            f"{e['state']['bf16']['dense_bytes'] / 2**30:.1f}",
            f"{e['state']['bf16']['ratio']:.3f}", f"{e['state']['bf16']['with_operands']:.3f}",
            f"{e['training']:.2f}", f"{PAPER[e['model']]['training']:.2f}",
            " / ".join(f"{x:.2f}" for x in e["inference"]),
            " / ".join(f"{x:.2f}" for x in PAPER[e["model"]]["inference"]),
        )
        for e in entries
    ]  # fmt: skip
    headers = (
        "model", "PFLOP a step", "state, GiB", "sparse", "with operands",
        "training, at most", "paper", "inference, at most", "paper",
    )  # fmt: skip
    print(tabulate(rows, headers, disable_numparse=True))
    print(
        f"{tokens} tokens; ceilings {args.tflops:g} TFLOP/s and {args.gbps:g} GB/s. A sparse "
        f"product is at most {TENSOR_CORES:g} times faster, a step with two of three sparse "
        f"{TWO_OF_THREE:g}. State: bf16 with fp32 moments, dense; then sparse over dense, without "
        "and with the operands that cuSPARSELt keeps under gradient accumulation. Inference at "
        f"ranks {', '.join(f'{rank:.2%}' for rank in RANKS)} of the hidden size."
    )
    write("paper_dry_run", args, ranks=RANKS, paper=PAPER, models=entries)


# --- on a device ---------------------------------------------------------------------------


class Case:
    """A model to measure: whole, or its first blocks with a small vocabulary.

    Attributes:
        name: the model's.
        sizes: its own.
        layers: blocks that are built.
        whole: whether that is all of it.
    """

    def __init__(self, name: str, kind: str, bench: Bench, args: argparse.Namespace) -> None:
        self.name, self.sizes = name, sizes_of(name)
        self.args, self.bench = args, bench
        self.whole = not args.quick and fits(self.sizes, kind, bench.device, args)
        self.layers = self.sizes.layers if self.whole else min(TRUNCATED, self.sizes.layers)
        self.backend = "inductor" if bench.device.type == "cuda" else "aot_eager"
        shape = (args.batch, args.context)
        self.ids = torch.randint(0, self._vocabulary(), shape, device=bench.device)

    def _vocabulary(self) -> int:
        return self.sizes.vocabulary if self.whole else min(SMALL_VOCABULARY, self.sizes.vocabulary)

    def model(self) -> nn.Module:
        """The dense model, the same each time, not compiled."""
        torch.manual_seed(0)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        try:
            with torch.device(self.bench.device):
                return self.sizes.build(self.layers, self._vocabulary(), self.args.context)
        finally:
            torch.set_default_dtype(usual)

    def compile_dense(self, model: nn.Module) -> nn.Module:
        """By ``torch.compile``: block by block if it is whole, as the sparse one then is."""
        if self.whole:
            decoder = model.model.decoder if self.sizes.family == "opt" else model.model
            for block in decoder.layers:
                block.compile(backend=self.backend)
        else:
            model.compile(backend=self.backend)
        return model

    def sparse(self, rank: float = 0.0) -> nn.Module:
        """The sparse model; with a rank in its adapter phase."""
        low = max(1, round(rank * self.sizes.hidden)) if rank else None
        model = slope_fx.compile(
            self.model(), PATTERN, adapter_rank=low, skip_first=self.whole, backend=self.backend,
            region="blocks" if self.whole else "model",
        )  # fmt: skip
        if low:
            slope_fx.Schedule(model, 1, adapter_start=0.0)
        return model

    def entry(self, kind: str, rank: float = 0.0, kept: bool = False) -> dict[str, Any]:
        """What it is, and what is to be expected of it."""
        roofline = Roofline(self.bench.flops_per_second, self.bench.bytes_per_second)
        built = replace(self.sizes, vocabulary=self._vocabulary())
        tokens = self.ids.numel()
        what = (built, self.layers, tokens, self.args.context)
        operations = (
            training(*what, skip_first=self.whole) if kind == "training"
            else inference(*what, rank, kept, skip_first=self.whole)
        )  # fmt: skip
        return {
            "model": self.name, "kind": kind, "rank": rank, "kept": kept, "layers": self.layers,
            "whole": self.whole, "tokens": tokens,
            "predicted": roofline.dense(operations) / roofline.sparse(operations),
        }  # fmt: skip


def fits(
    sizes: Architecture, kind: str, device: torch.device, args: argparse.Namespace, peers: int = 0
) -> bool:
    """Whether both sides of a whole model, so many peers, and what runs of it, go into memory."""
    if device.type != "cuda":
        return True
    tokens = args.batch * args.context
    if kind == "training":
        state = training_state(sizes, sizes.layers, 2, 2)
        activations = tokens * sizes.layers * 2 * (12 * sizes.hidden + 4 * sizes.ffn)
    else:
        state = inference_state(sizes, sizes.layers, max(RANKS))
        activations = tokens * 2 * (12 * sizes.hidden + 4 * sizes.ffn)
    logits = tokens * sizes.vocabulary * 12
    needed = (1 + peers) * state.dense + state.sparse + state.operands + activations + logits
    return needed < 0.85 * torch.cuda.get_device_properties(device).total_memory


def prune_like(dense: nn.Module, sparse: nn.Module) -> None:
    """Give the dense model the weights of the sparse one, so that their outputs can agree."""
    for name, weight in slope_fx.sparse_weights(sparse).items():
        dense.get_parameter(f"{name}.weight").data.copy_(weight.to_dense())


def checked(case: Case, got: nn.Module, want: nn.Module, what: str) -> float:
    """How far the logits of two models differ, for some tokens."""
    ids = case.ids[:1, : min(128, case.ids.shape[1])]
    with torch.no_grad():
        first, second = (m(input_ids=ids, use_cache=False).logits for m in (got, want))
    return agree(first, second, f"{case.name}, {what}", 5e-2)


def measure_training(bench: Bench, name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A training step, and the memory that each side needs for it."""
    if not bench.in_time(f"training of {name}"):
        return
    case = Case(name, "training", bench, args)
    dense, sparse = case.model(), case.sparse()
    prune_like(dense, sparse)
    off = checked(case, sparse, dense, "training")
    models = {"dense": case.compile_dense(dense), "sparse": sparse}
    steps = {kind: stepper(model, case.ids) for kind, model in models.items()}
    for step in steps.values():
        step()
        step()
    yield {
        **case.entry("training"), "difference": off,
        **compare(bench.seconds(steps), "dense", "sparse"),
        "memory": {
            kind: _sum(state_bytes(model), extra_bytes(bench, steps[kind]))
            for kind, model in models.items()
        },
        "explain": slope_fx.explain(sparse).to_dict(),
    }  # fmt: skip


def measure_inference(
    bench: Bench, name: str, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A forward pass at each rank, and by PyTorch's semi-structured tensors."""
    if not bench.in_time(f"inference of {name}"):
        return
    case = Case(name, "inference", bench, args)
    dense = case.model()
    first = case.sparse()
    prune_like(dense, first)
    peer, refusal = semi_structured(case, first)
    cases = [(RANKS[0], False), (RANKS[0], True), *((rank, False) for rank in RANKS[1:])]
    for number, (rank, kept) in enumerate(cases):
        if number and not bench.in_time(f"inference of {name}, {_how(rank, kept)}"):
            return
        with patch.dict(os.environ, SLOPE_FX_KEEP_OPERANDS="1" if kept else ""):
            sparse = case.sparse(rank) if number else first
            off = checked(case, sparse, dense, f"inference, {_how(rank, kept)}")
            if number == 0:
                case.compile_dense(dense)
            models = {"dense": dense, "sparse": sparse}
            if peer is not None:
                checked(case, peer, dense, "PyTorch's semi-structured tensors")
                models["peer"] = case.compile_dense(peer)
            runs: Runs = {kind: forward_pass(model, case.ids) for kind, model in models.items()}
            for run in runs.values():
                run()
                run()
            seconds = bench.seconds(runs)
            extra = {kind: extra_bytes(bench, run) for kind, run in runs.items()}
        report = slope_fx.explain(sparse)
        operands = sum(linear.operand_bytes for linear in report.sparse)
        weights = {"dense": _weights(dense), "sparse": _weights(sparse) + operands}
        yield {
            **case.entry("inference", rank, kept), "difference": off,
            **compare(seconds, "dense", "sparse"),
            "peer": compare(seconds, "dense", "peer") if "peer" in runs else None,
            "peer_refusal": refusal,
            "memory": {kind: _sum(weights[kind], extra[kind]) for kind in weights},
            "explain": report.to_dict(),
        }  # fmt: skip
        peer, refusal, first = None, "", None  # what they take is free for the next
        del models, runs, sparse
        _free()


def _how(rank: float, kept: bool) -> str:
    return f"r = {rank:.2%}{', operands kept' if kept else ''}"


def semi_structured(case: Case, sparse: nn.Module) -> tuple[nn.Module | None, str]:
    """The model by PyTorch's semi-structured tensors, or None and why not."""
    if case.whole and not fits(case.sizes, "inference", case.bench.device, case.args, peers=1):
        return None, "no memory for it beside the others"
    peer = case.model()
    prune_like(peer, sparse)
    try:
        for name in slope_fx.sparse_weights(sparse):
            linear = peer.get_submodule(name)
            weight = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
            linear.weight = nn.Parameter(weight, requires_grad=False)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return None, str(error).splitlines()[0]
    return peer, ""


def _sum(first: int, second: int | None) -> int | None:
    return None if second is None else first + second


def _weights(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def _free() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(entries: list[dict[str, Any]]) -> str:
    """The results as text, beside the paper's and the limits."""
    rows = []
    for e in entries:
        paper = PAPER.get(e["model"])
        reported = "" if paper is None else paper[e["kind"]]
        if isinstance(reported, tuple):
            reported = reported[RANKS.index(e["rank"])]
        memory = e["memory"]
        rows.append((
            e["model"], "whole" if e["whole"] else f"{e['layers']} blocks",
            e["kind"] + (f", {_how(e['rank'], e['kept'])}" if e["kind"] == "inference" else ""),
            f"{1e3 * e['dense_seconds']:.2f}", f"{1e3 * e['sparse_seconds']:.2f}",
            f"{e['speedup']:.2f}", f"{e['predicted']:.2f}", reported,
            f"{memory['sparse'] / memory['dense']:.2f}" if memory["dense"] else "",
            f"{e['peer']['speedup']:.2f}" if e.get("peer") else "",
        ))  # fmt: skip
    headers = (
        "model", "built", "what", "dense, ms", "SLoPe, ms", "times faster", "at most", "paper",
        "memory", "PyTorch's 2:4",
    )  # fmt: skip
    return tabulate(rows, headers, disable_numparse=True)


def measure(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device; --dry-run needs none.")
    if device.type == "cpu":
        args.models, args.batch, args.context, args.rounds = ["tiny"], 2, 8, 2
    bench = Bench(device, args.seconds, args.rounds)
    entries: list[dict[str, Any]] = []
    sections: list[Callable[..., Iterator[dict[str, Any]]]] = [measure_training, measure_inference]
    for name in args.models:
        for each in sections:
            entries += bench.section(1.0, each, [(name, args)])
            _free()
            write(  # after each, so that none is lost
                "paper", args, ranks=RANKS, gpu=device_of(bench), left_out=bench.left_out,
                wrong=bench.wrong, entries=entries,
            )  # fmt: skip
    print(table(entries))
    print(
        f"A sparse product is at most {TENSOR_CORES:g} times faster, a step with two of three "
        f"sparse {TWO_OF_THREE:g}; 'at most' is the roofline's for this device. Memory is sparse "
        "over dense, at the peak."
    )
    if bench.wrong:
        raise SystemExit("\n".join(bench.wrong))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dry-run", action="store_true", help="measure nothing")
    arguments.add_argument("--quick", action="store_true", help="two blocks of three models")
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=None)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--batch", type=int, default=8, help="sequences a step")
    arguments.add_argument("--context", type=int, default=2048, help="tokens a sequence, <= 2048")
    arguments.add_argument("--rounds", type=int, default=10)
    arguments.add_argument("--seconds", type=float, default=None, help="start nothing after these")
    arguments.add_argument("--tflops", type=float, default=312, help="--dry-run: dense, 16-bit")
    arguments.add_argument("--gbps", type=float, default=1555, help="--dry-run: of memory")
    args = arguments.parse_args()
    args.models = args.models or list(QUICK if args.quick else MODELS)
    args.seconds = args.seconds or (360.0 if args.quick else 3600.0)
    if not 1 <= args.context <= 2048:
        raise SystemExit(f"--context {args.context}; allowed are 1 to 2048, which OPT embeds.")
    dry_run(args) if args.dry_run else measure(args)


if __name__ == "__main__":
    main()
