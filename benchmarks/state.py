"""What lives from step to step, counted on live tensors: a model of each family of the paper's.

Two blocks at their full width are trained for a step, dense and sparse, in fp32 and in bf16 with
fp32 moments; parameters, masks, gradients and moments are counted as they lie. What that makes of
a whole model follows from the ratio of its pruned linears and the sizes of all else.

    python benchmarks/state.py
"""

import gc
from collections.abc import Iterable
from typing import Any

import torch
from arithmetic import training_state, weights
from common import parser, write
from memory import state_bytes
from paper import PAPER
from shapes import MODELS, TINY, Architecture
from tabulate import tabulate
from torch import nn

import slope_fx

FAMILIES = {"OPT": "OPT-2.6B", "LLaMA": "LLaMA-3-8B", "Mistral": "Mistral-7B"}
KINDS: dict[str, tuple[torch.dtype, int]] = {
    "fp32": (torch.float32, 4), "bf16 with fp32 moments": (torch.bfloat16, 2),
}  # fmt: skip
"""The weights' dtype and its bytes; moments take four."""


class AdamW(torch.optim.Optimizer):
    """AdamW with fp32 moments whatever the parameters are, which torch's own has not."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    for moment in ("exp_avg", "exp_avg_sq"):
                        state[moment] = torch.zeros_like(p, dtype=torch.float32)
                state["step"] += 1
                grad = p.grad.float()
                state["exp_avg"].lerp_(grad, 1 - first)
                state["exp_avg_sq"].lerp_(grad.square_(), 1 - second)
                size = (state["exp_avg_sq"] / (1 - second ** state["step"])).sqrt_()
                update = state["exp_avg"] / (1 - first ** state["step"]) / size.add_(group["eps"])
                p.mul_(1 - group["lr"] * group["decay"]).sub_(group["lr"] * update)


def pruned(model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """The parameters of the pruned linears' weights, dense or compressed, masks included."""
    prefixes = tuple(f"{name}.weight" for name in names)
    return [p for key, p in model.named_parameters() if key.startswith(prefixes)]


def count(sizes: Architecture, layers: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Bytes of the pruned linears and of the model as built, dense and sparse, after a step."""
    ids = torch.randint(0, min(sizes.vocabulary, 1024), (1, 4))
    found: dict[str, dict[str, int]] = {}
    names: list[str] = []
    for kind in ("sparse", "dense"):
        torch.set_default_dtype(dtype)
        model = sizes.build(layers, min(sizes.vocabulary, 1024), 8)
        torch.set_default_dtype(torch.float32)
        if kind == "sparse":
            slope_fx.compile(model, "2:4", backend="aot_eager", engine="cpu")
            names = list(slope_fx.sparse_weights(model))
        optimizer = AdamW(model.parameters(), lr=1e-4)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        found[kind] = {
            "pruned": state_bytes(pruned(model, names), optimizer),
            "model": state_bytes(list(model.parameters()), optimizer),
        }
        del model, optimizer
        torch._dynamo.reset()
        gc.collect()
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=2, help="blocks that are built")
    arguments.add_argument("--tiny", action="store_true", help="a toy: does it still run?")
    args = arguments.parse_args()
    measured: list[dict[str, Any]] = []
    whole: list[dict[str, Any]] = []
    for family, name in FAMILIES.items():
        for kind, (dtype, size) in KINDS.items():
            sizes = TINY if args.tiny else MODELS[name]
            found = count(sizes, args.layers, dtype)
            ratio = found["sparse"]["pruned"] / found["dense"]["pruned"]
            measured.append(
                {"family": family, "model": name, "state": kind, "ratio": ratio, **found}
            )
            for member, its in MODELS.items():
                if not member.startswith(f"{family}-"):
                    continue
                share = weights(its, its.layers)[0] * (2 * size + 8)
                dense = training_state(its, its.layers, size, 4).dense
                made = (dense - share + ratio * share) / dense
                whole.append({"model": member, "state": kind, "ratio": made})
    rows = [
        (m["model"], m["state"], *(f"{m[s]['pruned'] / 2**20:.0f}" for s in ("dense", "sparse")),
         f"{m['ratio']:.4f}")
        for m in measured
    ]  # fmt: skip
    headers = ("blocks of", "state", "dense, MiB", "SLoPe, MiB", "ratio")
    print(tabulate(rows, headers, disable_numparse=True))
    rows = [
        (w["model"], w["state"], f"{w['ratio']:.3f}", PAPER[w["model"]]["memory"][0]) for w in whole
    ]
    print(tabulate(rows, ("whole model", "state", "ratio", "paper"), disable_numparse=True))
    write("state", args, measured=measured, whole=whole)


if __name__ == "__main__":
    main()
