"""Every Triton kernel once in every configuration, at sizes that end inside of every tile.

For a sanitizer to watch: ``compute-sanitizer python tests/launch_kernels.py``. The results are
not looked at; ``test_triton_engine.py`` does that.
"""

import argparse

import torch

from slope_fx.kernels import triton
from slope_fx.kernels.triton import tuning


def launch_all(
    device: torch.device,
    groups: tuple[int, int],
    tokens: tuple[int, ...] = (1, 20, 40, 130),
    patterns: tuple[tuple[int, int], ...] = ((2, 4), (3, 8)),
) -> set[tuple[str, str]]:
    """Launch everything on weights of so many groups; returns the kernels and configurations."""
    launched: set[tuple[str, str]] = set()

    def best(kernel, key, space, run, device):
        for config in space[1:]:
            run(config)
        launched.update((kernel, config.name) for config in space)
        return space[0]

    before, tuning.best = tuning.best, best
    try:
        for n, m in patterns:
            d_out, d_in = (m * count for count in groups)
            weight = torch.randn(d_out, d_in, device=device, dtype=torch.bfloat16)
            values, forward = triton.prune(weight, n, m)
            triton.magnitude_mask(weight, n, m)
            backward = triton.backward_mask(values, forward, n, m)
            triton.compress(triton.expand(values, forward, n, m), forward, n, m)
            triton.expand_twice_pruned(values, forward, backward, n, m)
            triton.transpose(values, forward, backward, n, m)
            for count in tokens:
                x = torch.randn(count, d_in, device=device, dtype=torch.bfloat16)
                grad = torch.randn(count, d_out, device=device, dtype=torch.bfloat16)
                lora_b = torch.randn(d_out, 5, device=device, dtype=torch.bfloat16)
                y = triton.sparse_linear(x, values, forward, lora_b[:, 0], n, m, x[:, :5], lora_b)
                triton.low_rank_update(y, x[:, :5], lora_b, 0.5)
                triton.sparse_input_grad(grad, values, forward, backward, n, m)
                triton.sparse_weight_grad(grad, x, forward, n, m)
    finally:
        tuning.best = before
    if device.type == "cuda":
        torch.cuda.synchronize()
    return launched


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    done = launch_all(torch.device(arguments.device), (37, 41))
    print(f"{len(done)} configurations of kernels launched")
