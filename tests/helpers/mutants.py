"""Plausible faults, put into a copy of the sources one by one: does the CI slice catch each?

    python tests/helpers/mutants.py --write benchmarks/results/mutants.json

A fault is a text and what takes its place. The slice is ``tests/models/test_consistency.py``; what
survives it is run against the other tests that go through Inductor, which have one for each that
did.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SLICE = ("tests/models/test_consistency.py",)
FURTHER = ("tests/models/test_inductor.py", "tests/backend/test_modes.py")


class Mutant(NamedTuple):
    """A fault: in ``file``, ``before`` becomes ``after``."""

    what: str
    file: str
    before: str
    after: str


MUTANTS = (
    Mutant(
        "alpha of an addition, which Inductor drops",
        "passes/insert_adapters.py",
        "    return build\n\n\ndef _times",
        "    def with_alpha(x: Any, weight: Any, a: Any, b: Any, scale: Any, *more: Any) -> Any:\n"
        "        if stacked or part.blocks > 1 or dtype or read.stop - read.start != total:\n"
        "            return build(x, weight, a, b, scale, *more)\n"
        "        up = F.linear(F.linear(x, a), b)\n"
        "        return torch.add(F.linear(x, weight, more[0]), up, alpha=scale)\n\n"
        "    return with_alpha\n\n\ndef _times",
    ),
    Mutant(
        "the adapter's scale is lost",
        "passes/insert_adapters.py",
        "down = F.linear(x, a) * scale",
        "down = F.linear(x, a) * 1.0",
    ),
    Mutant(
        "the bias is forgotten",
        "passes/sparsify_linears.py",
        "masks, added = (forward, backward), bias if fused else None",
        "masks, added = (forward, backward), None",
    ),
    Mutant(
        "the first rows in the place of those that are read",
        "passes/sparsify_linears.py",
        "rows(t, read.start, read.stop, total) for t in (values, forward, backward)",
        "rows(t, 0, read.stop - read.start, total) for t in (values, forward, backward)",
    ),
    Mutant(
        "the input gradient of W^R, not of W^{R,C}",
        "ops/sparse_linear.py",
        "        masks = forward_mask, backward_mask\n        dx =",
        "        masks = forward_mask, backward_mask | 255\n        dx =",
    ),
    Mutant(
        "the bias's gradient is a mean",
        "ops/sparse_linear.py",
        "dbias = rows.sum(tuple(range(rows.dim() - 1)))",
        "dbias = rows.mean(tuple(range(rows.dim() - 1)))",
    ),
    Mutant(
        "the gradient of fp32 values is rounded to 16 bits under autocast",
        "ops/sparse_linear.py",
        "        dtype = None if values.dtype == grad.dtype else values.dtype\n        dvalues = "
        "sparse_weight_grad(grad, x, forward_mask, n, m, groups, offsets, name, dtype)",
        "        dvalues = sparse_weight_grad(grad, x, forward_mask, n, m, groups, offsets, name)"
        ".bfloat16().to(values.dtype)",
    ),
    Mutant(
        "a stale transpose: an operand is used after its weight changed",
        "kernels/operands.py",
        "        return self._values == (values.data_ptr(), values._version)",
        "        return True",
    ),
    Mutant(
        "the wrong expert's weight in the input gradient",
        "ops/sparse_linear.py",
        "        return product.sparse_input_grad(rows, of(values), *masks, n, m)",
        "        return product.sparse_input_grad(rows, of(values.flip(0)), *masks, n, m)",
    ),
    Mutant(
        "a method gives other values",
        "slope_fx/methods/method.py",
        "        return kept\n",
        "        return kept * 0.999\n",
    ),
    Mutant(
        "markers of different weights are merged",
        "passes/prune_expands.py",
        "known.setdefault((node.target, trains, *arguments(node).values()), node)",
        "known.setdefault((node.target, node.args[-2:], str(node.meta['example_value'].shape)),"
        " node)",
    ),
    Mutant(
        "the backward mask isn't refreshed",
        "slope_fx/sparse/weight.py",
        "            backward.copy_(self.chosen_backward_mask(values, forward))\n",
        "            pass\n",
    ),
    Mutant(
        "a checkpoint is loaded with its adapters asleep",
        "slope_fx/checkpoints/layers.py",
        "Adapter(a, b, entry.scale, entry.adapter_active)",
        "Adapter(a, b, entry.scale, False)",
    ),
    Mutant(
        "densify merges without the scale",
        "slope_fx/densify.py",
        "product = weight.scale * torch.bmm",
        "product = torch.bmm",
    ),
    Mutant(
        "PEFT's alpha is the scale",
        "slope_fx/integrations/peft.py",
        "weight.scale * (weight.rank or 0) for path",
        "weight.scale for path",
    ),
    Mutant(
        "passes save tensors where the caller counts them",
        "passes/graph.py",
        "    with torch.no_grad(), modes[0]:",
        "    torch._C._autograd._saved_tensors_hooks_set_tracing(False)\n"
        "    with torch.enable_grad(), modes[0]:",
    ),
)


def survives(
    mutant: Mutant | None, folder: Path, tests: tuple[str, ...] = SLICE
) -> tuple[bool, float, str]:
    """Whether the tests pass on the sources with the fault, its seconds, and who failed."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    for name in ("slope_fx", "passes", "ops", "kernels", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"symlinks": True} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, tree / name, **options)
    if mutant is not None:
        path = tree / mutant.file
        text = path.read_text()
        assert text.count(mutant.before) == 1, f"{mutant.file} has no single {mutant.before!r}"
        path.write_text(text.replace(mutant.before, mutant.after))
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-rf", "-k", "not committed_results", *tests],
        cwd=tree, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 0, time.perf_counter() - begun, (failed or [""])[0][7:120]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutants")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fine, seconds, failed = survives(None, folder)
        print(f"unchanged: passes {fine}, {seconds:.0f} s {failed}", flush=True)
        if not fine:
            sys.exit("the slice fails on the sources as they are")
        for number, mutant in enumerate(MUTANTS):
            if options.only and number not in options.only:
                continue
            alive, seconds, failed = survives(mutant, folder)
            rows.append({"fault": mutant.what, "file": mutant.file, "caught": not alive,
                         "by": failed, "seconds": round(seconds)})  # fmt: skip
            if alive:
                rows[-1]["by"] = survives(mutant, folder, FURTHER)[2]
            print(
                f"{number} {mutant.what}: {'SURVIVES' if alive else 'caught'} {failed}", flush=True
            )
    caught = sum(row["caught"] for row in rows)
    print(f"{caught} of {len(rows)} are caught")
    if options.write:
        options.write.write_text(json.dumps({"slice": SLICE, "faults": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
