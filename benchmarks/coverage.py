"""What becomes of every linear of many architectures, and how far the numbers are from float64.

Each small model (``tests/helpers/architectures.py``) is compiled with its adapters active; its
output and all gradients are held against METHOD's formulas in float64, eager. Then it is frozen;
its output, and that of its exported program after saving and loading, are held against the dense
copy in float64.

    python benchmarks/coverage.py
"""

import copy
import io
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import parser, write
from tabulate import tabulate

import slope_fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from architectures import ARCHITECTURES, inputs_of, logits_of, plain_experts
from formulas import formula_model, gradient_errors


def cover(name: str) -> dict[str, Any]:
    """One architecture."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    dense = ARCHITECTURES[name]().train()
    inputs = inputs_of(dense)
    model = slope_fx.compile(
        copy.deepcopy(dense), adapter_rank=2, example_inputs=inputs, backend="aot_eager",
        on_fallback="error",
    )  # fmt: skip
    slope_fx.Schedule(model, 1, adapter_start=0.0)
    for weight in slope_fx.sparse_weights(model).values():
        torch.nn.init.normal_(weight.lora_B, std=0.1)  # type: ignore[arg-type]
    explanation = slope_fx.explain(model)
    formulas = formula_model(plain_experts(dense), model)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    got, want = logits_of(model, inputs), logits_of(formulas, wide)
    grad = torch.randn(got.shape)
    got.backward(grad)
    want.backward(grad.double())
    reasons = Counter(r.reason for r in explanation.linears if r.kind == "dense")
    return {
        "architecture": name,
        "linears": len(explanation.linears),
        "sparse": len(explanation.sparse),
        "matrices": sum(w.stack for w in slope_fx.sparse_weights(model).values()),
        "dense": dict(reasons),
        "output_error": error(got, want),
        "gradient_error": max(gradient_errors(model, formulas).values()),
        **frozen(model, inputs),
    }


@torch.no_grad()
def frozen(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The errors of the frozen model and of its exported program, or why there is none."""
    model.eval()
    dense = plain_experts(slope_fx.densify(model)).double()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    want = logits_of(dense, wide)
    slope_fx.freeze(model)
    found: dict[str, Any] = {"frozen_error": error(logits_of(model, inputs), want)}
    try:
        program = torch.export.export(Logits(model), (inputs,))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        got = torch.export.load(file).module()(inputs)
    except Exception as problem:
        return {
            **found,
            "not_exported": f"{type(problem).__name__}: {str(problem).splitlines()[0]}",
        }
    return {**found, "exported_error": error(got, want)}


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return logits_of(self.model, inputs)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    entries = [cover(name) for name in ARCHITECTURES]
    rows = [
        (e["architecture"], e["linears"], e["sparse"], e["output_error"], e["gradient_error"],
         e["frozen_error"], e.get("exported_error", e.get("not_exported")))
        for e in entries
    ]  # fmt: skip
    headers = ("", "linears", "sparse", "output", "gradients", "frozen", "exported")
    print(tabulate(rows, headers))
    errors = ("output_error", "gradient_error", "frozen_error", "exported_error")
    if max(e.get(name, 0.0) for e in entries for name in errors) > 1e-3:
        raise SystemExit("Some numbers disagree; nothing written.")
    write("coverage", args, architectures=entries)


if __name__ == "__main__":
    main()
