"""docs/passes.md, and the figures of docs/checkpoints.md and docs/pretrained.md."""

from slope_fx.passes import PASSES

from .common import DOCS, Result, filled, page, read, section, speedup, table, taken

INTRODUCTION = """\
# The passes

`make readme` writes this page from the registry (`passes/registry.py`) and the files in
`benchmarks/results`. `make bench` writes those files.

`compile` replaces each sparse weight by a marker op. `torch.compile` traces a graph and calls the
backend. The backend runs these passes over the graph and over the graphs nested in it, in this
order. It then hands the graph to Inductor, or to the backend that you named.
"""

INSPECTION = """\
- `TORCH_LOGS="+slope_fx"` logs what each pass rewrites.
- `TORCH_TRACE=folder` writes torch's structured trace. It holds each graph before and after each
  pass. The tool `tlparse` shows it in a browser.
- `slope_fx.debug.first_difference(model, *inputs)` runs each graph before the passes and after each
  pass. It returns the first pass after which outputs or gradients differ.
- `slope_fx.compile(model, disable_passes=["normalize_linears"])` leaves out passes, by name.
- `passes=[mine]` runs your own functions of a `torch.fx.GraphModule` after these passes.
  `passes=[before, ..., after]` runs functions on both sides of them.
"""

FORMS = """\
slope_fx finds linears written as `F.linear`, `@`, `matmul`, `mm`, `mv`, `addmm`, `bmm`, `baddbmm`,
`inner`, `tensordot`, `einsum` of two operands, convolutions with a 1x1 kernel, grouped products,
and torch's own attention, including its fused evaluation. The weight may be on either side. It may
pass through transposes, views, casts, and slices of whole rows.

A linear stays dense, with a reason, if it uses some columns of a weight, if its weight is computed
from a parameter, or if other code uses the weight too. Experts stay dense if a Python loop calls
them, or if their weights are gathered for each token. Use transformers' grouped implementation,
which is its default.
"""


def passes() -> str:
    return page(
        INTRODUCTION,
        table([(f"`{p.name}`", p.does, p.here) for p in PASSES],
              ("pass", "what it does", "why it runs there")),
        section("See what a pass does", INSPECTION),
        coverage_section(read("coverage")),
        transposes_section(read("transposes")),
        regions_section(read("regions")),
    )  # fmt: skip


def coverage_section(result: Result) -> str:
    rows = []
    for entry in result["architectures"]:
        dense = "; ".join(f"{count}: {reason}" for reason, count in entry["dense"].items())
        stacked = entry["matrices"] - entry["sparse"]
        sparse = str(entry["sparse"]) + (f" ({entry['matrices']} matrices)" if stacked else "")
        rows.append((
            entry["architecture"], entry["linears"], sparse, dense,
            *(f"{entry[name]:.0e}" if name in entry else entry["not_exported"]
              for name in ("output_error", "gradient_error", "frozen_error", "exported_error")),
        ))  # fmt: skip
    headers = (
        "architecture", "linears", "sparse", "dense, and why", "output", "gradients", "frozen",
        "exported",
    )  # fmt: skip
    return section(
        "Which linears become sparse",
        "Small models of each architecture, compiled with the default arguments and with active "
        "adapters. A stack of experts counts as one linear and has a mask for each matrix. The "
        "last columns are errors in fp32, relative to the largest entry. They compare outputs "
        "and gradients with the method's formulas in float64 on an eager dense model, and the "
        "outputs of the frozen model and of its exported program, saved and loaded, with the "
        "dense copy in float64. "
        f"{taken(result)}",
        table(rows, headers),
        FORMS,
    )


def transposes_section(result: Result) -> str:
    arguments = result["arguments"]
    return section(
        "Kept transposes",
        "The input gradient needs the compressed transpose of `W^{R,C}`. With gradient "
        "accumulation, training uses this transpose more than once between two optimizer steps. "
        "The CPU engine then keeps it until the optimizer steps. This takes as much memory as the "
        f"values of the weight. `SLOPE_FX_KEEP_OPERANDS=0` keeps no transpose. A Llama of "
        f"{arguments['layers']} layers, width {arguments['width']}; {result['case']}; with and "
        f"without kept transposes, in turns in one process, through Inductor. {taken(result)}",
        table(
            [(speedup(result, 3), *(f"{1000 * result[f'{side}_seconds']:.1f}"
                                    for side in ("dense", "sparse")))],
            ("times faster with kept transposes", "ms without", "ms with"),
        ),
    )  # fmt: skip


def regions_section(result: Result) -> str:
    names = {
        "dense": "dense, `torch.compile`",
        "model": '`region="model"`',
        "auto": '`region="auto"`, by blocks',
    }
    rows = [
        (names[kind], f"{r['cold']['seconds']:.1f}", f"{r['warm']['seconds']:.1f}",
         f"{r['cold']['graph_cache_misses']}", f"{r['warm']['graph_cache_hits']}",
         f"{r['step']:.3f}")
        for kind, r in result["regions"].items()
    ]  # fmt: skip
    headers = ("", "first step, cold, s", "in a second process, s", "graphs compiled",
               "graphs from the cache then", "a step, s")  # fmt: skip
    arguments, auto = result["arguments"], result["regions"]["auto"]
    step = auto["step_speedup"]
    low, high = step["speedup_quartiles"]
    ratio = auto["cold"]["seconds"] / result["regions"]["model"]["cold"]["seconds"]
    return section(
        "Regions and compile time",
        '`region="auto"`, the default, compiles repeated blocks one by one. The blocks share their '
        "code. Layers outside the blocks stay eager, for example the head and the loss. In "
        "training, slope_fx calls a transformers model with `use_cache=False`, unless you pass "
        "`use_cache`. In `generate` the model uses a cache of keys and values, and each block "
        "would be a graph of its own. There slope_fx compiles the model as one graph.",
        f"A GPT-2 of {arguments['layers']} blocks and width {arguments['width']}, "
        f"{arguments['rows']} x 128 tokens, with its default dropout, through Inductor. The last "
        "column is without dropout. About ten seconds of a cold start belong to PyTorch, which "
        f"probes the compiler. {taken(result)}",
        table(rows, headers),
        f"The first step by blocks takes **{ratio:.2f}** of the time of the whole graph. A later "
        f"step by blocks is {step['speedup']:.2f}x as fast as with the whole graph ({low:.2f} to "
        f"{high:.2f}), and {auto['against_dense']['speedup']:.2f}x as fast as the dense model "
        "under `torch.compile`.",
    )


# --- docs/checkpoints.md, docs/pretrained.md -----------------------------------------------


def checkpoints() -> str:
    result = read("kill_and_resume")
    kills = (
        f"A run of {result['steps']} steps got a SIGKILL at {result['kills']} random moments: "
        f"{result['kills_in_sparse_phase']} in the sparse phase and "
        f"{result['kills_in_adapter_phase']} in the adapter phase, at startup, in a step, or in a "
        "write. Each time it resumed from its last checkpoint. It ended with the weights, masks, "
        "optimizer state, random states and losses of a run without kills, bit for bit "
        "(`benchmarks/kill_and_resume.py`)."
    )
    return filled((DOCS / "checkpoints.md").read_text(), {"kills": kills})


def pretrained() -> str:
    result = read("finetune_smollm")
    rows = []
    for variant, found in result["variants"].items():
        mask, _, adapter = variant.partition("/")
        figures = (f"{found[k]:.1f}" if k in found else "" for k in ("untrained", "trained"))
        rows.append((mask, adapter, *figures))
    order = ("dense", "magnitude", "wanda")
    starts = ("", "none", "zero", "svd", "eora")
    rows.sort(key=lambda row: (order.index(row[0]), starts.index(row[1])))
    headers = ("mask", "adapters from", "no training", f"after {result['steps']} steps")
    smollm = "\n\n".join([
        f"Perplexity on {result['held_out_tokens']:,} tokens of Hamlet and Macbeth. The model is "
        f"{result['model']} in fp32, {result['sparsity']}, rank {result['rank']}. Calibration "
        f"reads {result['calibration_tokens']:,} tokens. Training takes {result['steps']} steps of "
        f"{result['tokens_per_step']:,} tokens of the plays without these two.",
        table(rows, headers),
        "Each run was made once, is short, and uses one learning rate. The dense model learns the "
        "plays too. Adapters from EoRA start and end at a lower perplexity than adapters from SVD, "
        "and these are lower than no adapters. The worse the mask, the more the adapters restore.",
    ])  # fmt: skip
    return filled((DOCS / "pretrained.md").read_text(), {"smollm": smollm})
