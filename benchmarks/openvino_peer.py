"""One token through the 420 M GPT-2 at 2:4: a frozen model beside OpenVINO, which can store sparse
weights compressed.

OpenVINO gets the densified model, with zeros. Its property
``CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE`` compresses weights with at least that share of zeros.
It is for int8 weights on processors with AMX, so OpenVINO also gets the weights compressed to
int8 by NNCF, if that is installed. The sides run in turns; their logits are compared first.

    pip install openvino nncf
    python benchmarks/openvino_peer.py
"""

import copy
import statistics
from collections.abc import Callable
from typing import Any

import openvino as ov
import torch
from common import agree, interleave, parser, write
from frozen import MODELS, frozen
from tabulate import tabulate

import slope_fx

SPARSE = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": "0.4"}


class Logits(torch.nn.Module):
    """A model's logits alone, without its cache."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        # With a mask, transformers does not look for packed sequences, by an op OpenVINO lacks.
        mask = torch.ones_like(ids)
        logits: torch.Tensor = self.model(ids, attention_mask=mask, use_cache=False).logits
        return logits


def compiled(model: Any, threads: int, more: dict[str, str]) -> Callable[[torch.Tensor], Any]:
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    made = ov.Core().compile_model(model, "CPU", {**hints, **more})
    request = made.create_infer_request()
    return lambda ids: request.infer([ids.numpy()])[made.outputs[0]]


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="GPT-2, 420 M", choices=list(MODELS))
    arguments.add_argument("--rounds", type=int, default=30)
    args = arguments.parse_args()
    torch.manual_seed(0)
    dense = MODELS[args.model]().eval().requires_grad_(False)
    ids, threads = torch.randint(0, 1000, (1, 1)), torch.get_num_threads()
    model = frozen(dense)
    plain = Logits(slope_fx.densify(model))
    want = plain(ids)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    converted = ov.convert_model(plain, example_input=ids)
    sides: dict[str, Callable[[torch.Tensor], Any]] = {
        "frozen, fp32": lambda x: model(x, use_cache=False).logits,
        "OpenVINO, fp32": compiled(converted, threads, exact),
        "OpenVINO, fp32, sparse weights": compiled(converted, threads, {**exact, **SPARSE}),
    }
    int8 = frozen(dense, values="int8")
    sides["frozen, int8"] = lambda x: int8(x, use_cache=False).logits
    try:
        import nncf
    except ImportError:
        print("NNCF is not installed: OpenVINO has no int8 side.")
    else:
        coded = nncf.compress_weights(
            copy.deepcopy(converted), mode=nncf.CompressWeightsMode.INT8_SYM
        )
        sides["OpenVINO, int8"] = compiled(coded, threads, exact)
        sides["OpenVINO, int8, sparse weights"] = compiled(coded, threads, {**exact, **SPARSE})
    far = {
        side: agree(torch.as_tensor(run(ids)).clone(), want, side, 0.05 if "int8" in side else 1e-3)
        for side, run in sides.items()
    }
    runs = {side: (lambda run=run: run(ids)) for side, run in sides.items()}  # type: ignore[misc]
    seconds = interleave(runs, args.rounds)
    rows = [
        {"side": side, "seconds": statistics.median(taken), "difference": far[side],
         "quartiles": statistics.quantiles(taken, n=4)[::2]}
        for side, taken in seconds.items()
    ]  # fmt: skip
    write("openvino_peer", args, openvino=str(ov.__version__), rows=rows)
    print(tabulate([(r["side"], 1e3 * r["seconds"]) for r in rows], ("", "ms"), floatfmt=".1f"))


if __name__ == "__main__":
    main()
