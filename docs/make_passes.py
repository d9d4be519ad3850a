"""Write docs/passes.md from the registry of passes and the files in benchmarks/results.

make readme
"""

from pathlib import Path
from typing import Any

from make_results import read, table, taken

from slope_fx.passes import PASSES

PAGE = Path(__file__).resolve().parent / "passes.md"

INTRODUCTION = """\
# The passes

Written by `make readme` from the registry (`passes/registry.py`) and the files in
`benchmarks/results`, which `make bench` writes.

`compile` puts a marker in the place of each sparse weight. When torch.compile has traced a graph,
these passes run over it, and over the graphs nested in it, in this order; then comes the backend.
"""

SHOWN = """\
## To see what they do

- `slope_fx.explain(model, graphs=True)` writes, for each graph that was compiled, its code as it
  was traced and after each pass, the differences, and a table of matches and node counts, into
  `slope_fx_graphs` (or the folder you name). `SLOPE_FX_GRAPHS=folder` does so as graphs are
  compiled.
- `slope_fx.compile(model, disable_passes=["merge_linears"])` leaves passes out, by name;
  `enable_passes=["fuse_bias"]` runs one that is off.
- `slope_fx.debug.first_difference(model, *inputs)` runs each graph before the passes and after each
  of them, and names the first after which outputs or gradients differ.
- `passes=[mine]` runs your own functions of a `torch.fx.GraphModule` after these;
  `passes=[before, ..., after]` around them.
"""


def passes_section() -> str:
    rows = [(f"`{p.name}`", p.does, p.here, p.off_because) for p in PASSES]
    return table(rows, ("pass", "what it does", "why there", "off by default, because"))


def coverage_section(result: dict[str, Any]) -> str:
    rows = []
    for entry in result["architectures"]:
        dense = "; ".join(f"{count}: {reason}" for reason, count in entry["dense"].items())
        stacked = entry["matrices"] - entry["sparse"]
        sparse = str(entry["sparse"]) + (f" ({entry['matrices']} matrices)" if stacked else "")
        rows.append((
            entry["architecture"], entry["linears"], sparse, dense,
            f"{entry['output_error']:.0e}", f"{entry['gradient_error']:.0e}",
        ))  # fmt: skip
    headers = ("architecture", "linears", "sparse", "dense, and why", "output", "gradients")
    return f"""\
## What becomes of the linears

Small models of each architecture, compiled with the default arguments and with active adapters. A
stack of experts is one linear here, with a mask for each of its matrices. The last columns say how
far outputs and gradients, in fp32, are from the method's formulas in float64 on an eager dense
model, relative to the largest entry. {taken(result)}

{table(rows, headers)}

Found are linears written as `F.linear`, `@`, `matmul`, `mm`, `mv`, `addmm`, `bmm`, `baddbmm`,
`inner`, `tensordot`, `einsum` of two operands, convolutions of one pixel, grouped products, torch's
own attention (its fused evaluation too), with the weight on either side, through transposes, views,
casts, and slices of whole rows. Dense, with the reason, stays what uses some columns of a weight, a
weight that is computed from a parameter, or one that something else uses too. Experts that are
called in a loop of Python, or by weights gathered for each token, can't be traced so: use
transformers' grouped implementation, its default.
"""


def fusions_section(result: dict[str, Any]) -> str:
    rows = [
        (e["case"], e["fusion"], f"**{e['gain']:.3f}** ({e['gain_quartiles'][0]:.3f} to "
         f"{e['gain_quartiles'][1]:.3f})", f"{1000 * e['without_seconds']:.1f}",
         f"{1000 * e['with_seconds']:.1f}")
        for e in result["fusions"]
    ]  # fmt: skip
    headers = ("case", "what is left out", "times faster with it", "ms without", "ms with")
    width, layers = result["arguments"]["width"], result["arguments"]["layers"]
    return f"""\
## What the fusions gain

The same model with and without, in turns in one process, through Inductor on the CPU engine;
medians, and between which half of the paired ratios lie. What gains nothing is off by default. A
Llama of {layers} layers, width {width}. {taken(result)}

{table(rows, headers)}

*Kept transposes*: the input gradient needs the transpose of `W^{{R,C}}`, compressed. Where training
uses it again between two optimizer steps (gradient accumulation), the CPU engine keeps it until
the optimizer steps, which takes as much memory as the weight's values do;
`SLOPE_FX_KEEP_OPERANDS=0` keeps none.

Not fused: an activation, for no engine has one, and Inductor makes one kernel of it and its
neighbours; constants at inference, of which there are none but weights that no pass could rewrite,
and these Inductor folds with its own option `freezing`.
"""


def regions_section(result: dict[str, Any]) -> str:
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
               "of these from the cache then", "a step, s")  # fmt: skip
    arguments, found = result["arguments"], result["regions"]
    step = found["auto"]["step_speedup"]
    low, high = step["speedup_quartiles"]
    ratio = found["auto"]["cold"]["seconds"] / found["model"]["cold"]["seconds"]
    return f"""\
## Regions, and how long compiling takes

`region="auto"`, the default, compiles repeated blocks one by one, which share their code. What is
outside of them stays eager, the head and the loss for example. A transformers model is called with
`use_cache=False` while it trains, unless you say otherwise; where a cache of keys and values is
used (`generate`), it is compiled as a whole, for there each block would be a graph of its own.

A GPT-2 of {arguments["layers"]} blocks and width {arguments["width"]}, {arguments["rows"]} x 128
tokens, with its own dropout, through Inductor; the last column without dropout. Some ten seconds
of a cold start are PyTorch's own, in which it probes the compiler. {taken(result)}

{table(rows, headers)}

By blocks the first step takes **{ratio:.2f}** of the time of the whole graph. A step by blocks is
{step["speedup"]:.2f}x as fast as with the whole graph ({low:.2f} to {high:.2f}), and
{found["auto"]["against_dense"]["speedup"]:.2f}x as fast as the dense model under `torch.compile`.
"""


def page() -> str:
    parts = [
        INTRODUCTION, passes_section(), SHOWN, coverage_section(read("coverage")),
        fusions_section(read("passes")), regions_section(read("regions")),
    ]  # fmt: skip
    return "\n".join(part.strip() + "\n" for part in parts)


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
