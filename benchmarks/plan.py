"""What each of 64 ranks holds and receives for Llama 3 of 70 billion parameters, by ``explain``.

The model is not allocated: the command's time and its peak of resident memory are measured.

    python benchmarks/plan.py
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import parser, write

from slope_fx.report import Explanation

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=80)
    arguments.add_argument("--world-size", type=int, default=64)
    arguments.add_argument("--adapter-rank", type=int, default=128)
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = {**LLAMA_70B, "num_hidden_layers": args.layers}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        command = [
            sys.executable, "-m", "slope_fx", "explain", folder, "--no-measure", "--json",
            "--world-size", str(args.world_size), "--adapter-rank", str(args.adapter_rank),
        ]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = json.loads(done.stdout)
    print(Explanation.from_dict(told).sharding)
    print(f"{seconds:.0f} s, {used.ru_maxrss / 2**10:.0f} MiB")
    write(
        "plan", args, sharding=told["sharding"], seconds=seconds, cpu_seconds=used.ru_utime,
        peak_resident=1024 * used.ru_maxrss,
    )  # fmt: skip


if __name__ == "__main__":
    main()
