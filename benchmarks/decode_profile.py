"""Where a decoding step of SmolLM2-135M goes, dense and frozen, in bf16.

The time of a step is the median without a profiler; its parts are the shares that torch.profiler
finds, by the names of the ops.

    python benchmarks/decode_profile.py
"""

import re
import statistics
from typing import Any

import torch
from common import interleave, parser, write
from frozen import MODELS, decoding, frozen
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

MODEL, STEPS = "SmolLM2-135M", 20
SIDES: dict[str, dict[str, Any] | None] = {
    "dense": None, "2:4": {}, "2:4 + adapters": {"rank": 1 / 64}, "2:4 int8": {"values": "int8"},
    "2:4 int4": {"values": "int4"},
}  # fmt: skip
PARTS = {
    "sparse products": r"slope_fx::.*",
    "dense products": r"(aten::(mm|addmm|bmm|linear)|mkldnn::.*)",
    "attention": r"aten::_scaled_dot_product.*",
    "guards of Dynamo": r"TorchDynamo Cache Lookup",
}
"""By the names of ops, in the profiler's words. All others are the rest."""


def shares(step: Any) -> dict[str, float]:
    """The share of each part in the time of a step."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            step()
    times = dict.fromkeys([*PARTS, "rest"], 0.0)
    for event in found.key_averages():
        part = next((p for p, name in PARTS.items() if re.fullmatch(name, event.key)), "rest")
        times[part] += event.self_cpu_time_total
    whole = sum(times.values())
    return {part: taken / whole for part, taken in times.items()}


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=60)
    args = arguments.parse_args()
    torch._dynamo.config.recompile_limit = 200  # all sides run the same code
    torch._dynamo.config.accumulated_recompile_limit = 2000
    dense = MODELS[MODEL]().to(torch.bfloat16).eval().requires_grad_(False)
    steps = {}
    for side, options in SIDES.items():
        model: Any = torch.compile(dense) if options is None else frozen(dense, **options)
        steps[side] = decoding(model, dense.config, 1)
        for _ in range(3):
            steps[side]()
    seconds = interleave(steps, args.rounds)
    sides = [
        {"side": side, "seconds": statistics.median(seconds[side]), "shares": shares(step)}
        for side, step in steps.items()
    ]
    print(tabulate([{"side": s["side"], "ms": 1e3 * s["seconds"], **s["shares"]} for s in sides],
                   headers="keys", floatfmt=".2f"))  # fmt: skip
    write("decode_profile", args, model=MODEL, sides=sides)


if __name__ == "__main__":
    main()
