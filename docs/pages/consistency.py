"""docs/consistency.md: how far each road is from the method's formulas."""

from collections.abc import Callable, Iterable
from typing import Any

from .common import page, read, section, table, taken

Cell = dict[str, Any]

CASES = (
    "train", "eval", "one token", "accumulation", "checkpoint, reentrant",
    "checkpoint, non-reentrant", "checkpoint around, reentrant", "checkpoint around, non-reentrant",
    "steps", "masks",
)  # fmt: skip

INTRODUCTION = """\
# Consistency

`make readme` writes this page from `benchmarks/results/consistency.json`. `make test-full` writes
that file (`tests/helpers/consistency.py`). `pytest` runs a part of it each time.

You can compile a model by blocks or as one graph, with Inductor or another backend, on any engine.
You can save and load it, merge its adapters into a dense model, or export it to PEFT. All of these
*roads* must compute the same. Each small random model below takes each road, in the sparse phase
and in the adapter phase. There the product of the adapters is as large as the weight.
"""

COMPARED = """\
The reference is the method's formulas in float64, on the eager dense model. The formulas share no
code with slope_fx (`tests/helpers/formulas.py`). The comparison covers the loss, the logits and the
gradient of every parameter. An error is the largest difference, relative to the largest number of
the same tensor. Some gradients are close to zero, for example that of a key's bias. Their errors
are relative to a hundredth of the largest gradient. In 16 bits the norms of gradients are compared.

- *train*, *eval*: forward and backward; forward under `no_grad`. *One token*: one sequence of
  length one, so shapes are dynamic too. *Accumulation*: the gradients of two micro-batches.
- *Checkpoint*: activation checkpointing as transformers turns it on, in a model that is compiled as
  one graph. *Around*: activation checkpointing around each compiled block, called by an eager
  model. Both run reentrant and non-reentrant.
- *Steps*: two steps of AdamW. Backward masks are refreshed after each step. The formulas take the
  same steps in float64 and choose their own masks. The comparison covers losses, logits, gradients,
  masks, and how far each weight moved. The bound for the last is ten times as large.
- *Masks*: masks and weights as compressed, against the method's choice on the dense weights.
- *Merged* is the plain dense model of `densify(model)`, eager. Its input gradients use the weight
  that is pruned once, and its reference does too. *PEFT* is `densify(model, "peft")`, without
  gradients; "refused" where PEFT has no adapter for a layer.
"""


def error_of(cell: Cell) -> tuple[float, str]:
    """The error nearest to its bound, and of what."""
    shares = {check: error / cell["bounds"][check] for check, error in cell["errors"].items()}
    worst = max(shares, key=lambda check: shares[check])
    return cell["errors"][worst], worst


def shown(cells: Iterable[Cell]) -> str:
    """The worst error of some comparisons, and of what; or why there is none."""
    cells = list(cells)
    compared = [cell for cell in cells if not cell["outcome"]]
    if any(cell["outcome"].startswith("failed") for cell in cells):
        return "**failed**"
    if not compared:
        return cells[0]["outcome"].partition(":")[0] if cells else ""
    worst = max(compared, key=lambda cell: error_of(cell)[0] / cell["bounds"][error_of(cell)[1]])
    error, check = error_of(worst)
    text = f"{error:.0e} {check}"
    return text if error <= worst["bounds"][check] else f"**{text}**"


def rows_of(
    cells: list[Cell], columns: Iterable[Callable[[Cell], bool]], text: Callable[..., str] = shown
) -> list[list[str]]:
    """A row for each model and phase, a field for each choice of its cells."""
    rows, columns = [], list(columns)
    for name, phase in dict.fromkeys((c["architecture"], c["phase"]) for c in cells):
        own = [c for c in cells if (c["architecture"], c["phase"]) == (name, phase)]
        fields = [text(filter(column, own)) for column in columns]
        rows.append([name if phase == "sparse" else "", phase, *fields])
    return rows


def roads_section(cells: list[Cell], result: dict[str, Any]) -> str:
    plain = [c for c in cells if c["dtype"] == "fp32" and c["case"] not in ("steps", "masks")]
    roads = list(dict.fromkeys(cell["road"] for cell in plain))
    rows = rows_of(plain, [lambda c, r=road: c["road"] == r for road in roads])
    allowed = plain[0]["bounds"].get("logits", 0.0) if plain else 0.0
    return section(
        "By road, in fp32",
        f"Each cell has the largest error, and names the result that has it. The case *steps* is "
        f"left out. The bound is {allowed:.0e}. `cpu-dense`, `dense` and `reference` are engines; "
        f"they run on aot_eager. All other columns use the engine `cpu`. {taken(result)}",
        table(rows, ("model", "phase", *roads)),
    )


def cases_section(cells: list[Cell]) -> str:
    plain = [c for c in cells if c["dtype"] == "fp32"]
    found = {cell["case"] for cell in plain}
    cases = [case for case in CASES if case in found]
    rows = rows_of(plain, [lambda c, k=case: c["case"] == k for case in cases])
    return section(
        "By case, in fp32",
        "The worst error of all roads that the case runs on.",
        table(rows, ("model", "phase", *cases)),
    )


def precision_section(cells: list[Cell]) -> str:
    def share(chosen: Iterable[Cell]) -> str:
        chosen = list(chosen)
        errors = [c for c in chosen if c["errors"]]
        if not errors or any(c["outcome"].startswith("failed") for c in chosen):
            return shown(chosen)
        worst = max(errors, key=lambda c: error_of(c)[0] / c["bounds"][error_of(c)[1]])
        error, check = error_of(worst)
        return f"{error:.0e} of {worst['bounds'][check]:.0e} {check}"

    low = [c for c in cells if c["dtype"] != "fp32"]
    kinds = list(dict.fromkeys((c["dtype"], c["road"]) for c in low))
    rows = rows_of(low, [lambda c, k=kind: (c["dtype"], c["road"]) == k for kind in kinds], share)
    return section(
        "In bf16 and under autocast",
        "bf16 parameters, and fp32 parameters under bf16 autocast. The bound is eight times the "
        "error of the merged model, plain and dense, in the same dtype against itself in float64, "
        "and at least 2^-7. Routers choose all experts here, because rounding can change their "
        "choice.",
        table(rows, ("model", "phase", *(f"{road}, {dtype}" for dtype, road in kinds))),
    )


def gaps_section(cells: list[Cell]) -> str:
    gaps: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell["outcome"]:
            where = cell["case"] if cell["case"].startswith("checkpoint") else cell["road"]
            models = gaps.setdefault((cell["outcome"], where), [])
            if cell["architecture"] not in models:
                models.append(cell["architecture"])
    rows = [(where, ", ".join(models), outcome) for (outcome, where), models in gaps.items()]
    return section("Not compared", table(rows, ("road or case", "models", "why")))


def consistency() -> str:
    result = read("consistency")
    cells = result["cells"]
    compared = sum(not cell["outcome"] for cell in cells)
    models = len({cell["architecture"] for cell in cells})
    return page(
        INTRODUCTION,
        f"{compared} comparisons. Each of the {models} models runs in a process of its own.",
        section("What is compared", COMPARED),
        roads_section(cells, result),
        cases_section(cells),
        precision_section(cells),
        gaps_section(cells),
    )
