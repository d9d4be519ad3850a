"""Every Triton kernel once in every configuration, at sizes that end inside of every tile.

For a sanitizer to watch: ``compute-sanitizer python tests/helpers/launch_kernels.py``. The results
are not looked at; ``test_triton_engine.py`` does that. With ``--compile-only`` nothing is
launched: the arguments of each launch go through Triton as on a GPU, up to the machine code.
"""

import argparse

import torch

from slope_fx.kernels.quantised import DEFAULT_GROUP, quantise
from slope_fx.kernels.triton import Triton, tuning

triton = Triton()


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
            forward = triton.magnitude_mask(weight, n, m)
            values = triton.compress(weight, forward, n, m)
            backward = triton.backward_mask(values, forward, n, m)
            triton.expand(values, forward, n, m)
            triton.expand_twice_pruned(values, forward, backward, n, m)
            drawn = torch.randn(values.shape, device=device)  # nothing may have filled the values
            quantised = [
                (*quantise(drawn, kind, group), forward, group)
                for kind, group in DEFAULT_GROUP.items()
            ]
            for codes, scales, mask, group in quantised:
                triton.expand_quantised(codes, scales, mask, n, m, group, d_in, torch.bfloat16)
            for count in tokens:
                x = torch.randn(count, d_in, device=device, dtype=torch.bfloat16)
                grad = torch.randn(count, d_out, device=device, dtype=torch.bfloat16)
                bias = torch.randn(d_out, device=device, dtype=torch.bfloat16)
                triton.sparse_linear(x, values, forward, bias, n, m)
                for codes, scales, mask, group in quantised:
                    triton.quantised_linear(x, codes, scales, mask, bias, n, m, group)
                triton.sparse_input_grad(grad, values, forward, backward, n, m)
                triton.sparse_weight_grad(grad, x, forward, n, m)
    finally:
        tuning.best = before
    if device.type == "cuda":
        torch.cuda.synchronize()
    return launched


def compile_instead_of_launching(capability: int) -> None:
    """From here on Triton compiles for a GPU that isn't there, and launches nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Absent:
        """What of a driver is asked for before a launch."""

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

    run = jit.JITFunction.run
    driver.set_active(Absent())
    jit.JITFunction.run = lambda self, *args, **options: run(
        self, *args, **{**options, "warmup": True}
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile-only", action="store_true")
    if parser.parse_args().compile_only:
        compile_instead_of_launching(90)
        done = launch_all(torch.device("cpu"), (37, 41), tokens=(1, 20), patterns=((2, 4),))
    else:
        done = launch_all(torch.device("cuda"), (37, 41))
    print(f"{len(done)} configurations of kernels launched")
