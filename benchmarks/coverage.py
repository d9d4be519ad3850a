"""What becomes of every linear of many architectures, and how far the numbers are from float64.

Each small model (``tests/helpers/architectures.py``) is compiled with its adapters active; its
output and all gradients are held against METHOD's formulas in float64, eager.

    python benchmarks/coverage.py
"""

import copy
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
        "output_error": ((got.double() - want).abs().max() / want.abs().max()).item(),
        "gradient_error": max(gradient_errors(model, formulas).values()),
    }


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    entries = [cover(name) for name in ARCHITECTURES]
    rows = [
        (e["architecture"], e["linears"], e["sparse"], e["output_error"], e["gradient_error"])
        for e in entries
    ]
    print(tabulate(rows, ("", "linears", "sparse", "output off by", "gradients off by")))
    if max(e["gradient_error"] for e in entries) > 1e-3:
        raise SystemExit("Some gradients disagree; nothing written.")
    write("coverage", args, architectures=entries)


if __name__ == "__main__":
    main()
