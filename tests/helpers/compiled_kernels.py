"""Every Triton kernel, in every configuration, compiled for every architecture: no GPU needed.

``python tests/helpers/compiled_kernels.py --write`` writes the table that
``test_triton_compiled.py`` compares with. Run it without
``TRITON_INTERPRET``, which would replace the kernels by something to interpret.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slope_fx.kernels.triton import configs, linear, masks, reduce, weight_grad, weights
from slope_fx.kernels.triton.configs import Config

TABLE = Path(__file__).with_name("compiled_kernels.json")
ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

FLAGS = {
    "expand": [
        {"TWICE": False}, {"TWICE": True}, {"BITS": 8, "GROUP": 64}, {"BITS": 4, "GROUP": 32},
    ],
    "linear": [
        {"BIAS": True}, {"BIAS": False, "ones": True}, {"BIAS": True, "wide": True},
        {"BIAS": True, "BITS": 8, "GROUP": 64}, {"BIAS": True, "BITS": 4, "GROUP": 32},
    ],
    "input_grad": [{}, {"ones": True}, {"wide": True}],
    "weight_grad": [{}, {"ones": True}],
    "add_up": [{}, {"ones": True}],
}  # fmt: skip
"""The options of each kernel besides its pattern, the usual first. "ones": Triton makes a constant
of an argument that is 1, so that one token or one part is other code. "wide": fp32 values with
16-bit inputs, as under autocast."""
ONES = ("tokens", "parts", "length")

DOTS = ("linear", "input_grad", "weight_grad")
BYTES = ("bits", "forward", "backward")
CODES = {0: None, 4: "u8", 8: "i8"}
FLOATS = ("partial",)
POINTERS = (
    *BYTES, *FLOATS, "weight", "values", "scales", "dense", "x", "y", "grad", "dx", "dw", "bias",
    "result",
)  # fmt: skip


class Variant(NamedTuple):
    """A kernel as it is compiled: what the table has a row for."""

    kernel: str
    dtype: str
    n: int
    m: int
    flags: tuple[tuple[str, int], ...]
    config: Config
    arch: int

    @property
    def row(self) -> str:
        flags = "".join(
            f" {name.lower()}{'' if on is True else on}" for name, on in self.flags if on
        )
        return (
            f"{self.kernel} {self.dtype} {self.n}:{self.m}{flags} [{self.config.name}] "
            f"sm_{self.arch}"
        )


KERNELS = {
    "magnitude_mask": masks.magnitude_mask,
    "backward_mask": masks.backward_mask,
    "expand": weights.expand,
    "compress": weights.compress,
    "linear": linear.linear,
    "input_grad": linear.input_grad,
    "weight_grad": weight_grad.weight_grad,
    "add_up": reduce.add_up,
}


def spaces(kernel: str, m: int, itemsize: int) -> list[Config]:
    """All configurations that a kernel may run with, for any number of tokens."""
    tokens = (1, 32, 64, 4096)
    return list(dict.fromkeys({
        "magnitude_mask": lambda: configs.mask_configs(m),
        "backward_mask": lambda: configs.backward_mask_configs(m),
        "expand": lambda: configs.copy_configs(m),
        "compress": lambda: configs.copy_configs(m),
        "linear": lambda: [c for t in tokens for c in configs.linear_configs(m, t, itemsize)],
        "input_grad": lambda: [
            c for t in tokens for c in configs.input_grad_configs(m, t, itemsize)
        ],
        "weight_grad": lambda: configs.weight_grad_configs(m, itemsize),
        "add_up": lambda: [configs.REDUCE],
    }[kernel]()))  # fmt: skip


def variants() -> Iterator[Variant]:
    """All rows: every configuration at 2:4 in bf16 for every architecture, and the usual ones in
    fp32; for one of them the usual ones also in fp16, in other patterns, and with what else a
    kernel can be asked for."""
    for kernel in KERNELS:
        usual, *others = (tuple(flags.items()) for flags in FLAGS.get(kernel, [{}]))
        for arch in ARCHITECTURES:
            for config in spaces(kernel, 4, 2):
                yield Variant(kernel, "bf16", 2, 4, usual, config, arch)
            for config in spaces(kernel, 4, 4)[::4]:
                yield Variant(kernel, "fp32", 2, 4, usual, config, arch)
        for config in spaces(kernel, 4, 2)[::4]:
            yield Variant(kernel, "fp16", 2, 4, usual, config, 90)
            for flags in others:
                yield Variant(kernel, "bf16", 2, 4, flags, config, 90)
        if kernel != "add_up":
            for n, m in ((1, 2), (2, 8), (3, 8), (8, 16)):
                yield Variant(kernel, "bf16", n, m, usual, spaces(kernel, m, 2)[0], 90)


def compiled(variant: Variant) -> tuple[str, dict[str, Any]]:
    """A row of the table: registers, bytes of stack (spills) and of shared memory, instruction."""
    kernel = KERNELS[variant.kernel]
    constants: dict[str, Any] = {"column_stride": 1, "TWICE": False, "BITS": 0, "GROUP": 0}
    constants |= {"N": variant.n, "M": variant.m, **dict(variant.flags)}
    wide = constants.pop("wide", False)
    if constants.pop("ones", False):
        constants |= dict.fromkeys(ONES, 1)
    constants |= dict(variant.config.blocks)
    constants["PRECISION"] = "tf32x3" if variant.dtype == "fp32" else "tf32"
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            kind = "u8" if name in BYTES else "fp32" if name in FLOATS else variant.dtype
            if wide and name == "values":
                kind = "fp32"
            if name == "values":
                kind = CODES[constants.get("BITS", 0)] or kind
            if name == "scales":
                kind = "bf16"
            signature[name] = f"*{kind}" if name in POINTERS else "i32"
            if name not in ("tokens", "parts"):  # as sizes of layers are
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": variant.config.warps, "num_stages": variant.config.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=options)
    usage = resources(binary.asm["cubin"])
    usage["shared"] = max(usage["shared"], binary.metadata.shared)
    text = binary.asm["ptx"]
    found = re.search(r"tcgen05\.mma|wgmma\.mma_async|mma\.sync", text)
    usage["mma"] = found[0] if found else ""
    return variant.row, usage


def resources(cubin: bytes) -> dict[str, int]:
    """What the assembler says of a kernel's registers, stack and static shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, shared = (
        int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "SHARED")
    )
    return {"registers": registers, "stack": stack, "shared": shared}


def table(
    architectures: Iterable[int] = ARCHITECTURES, workers: int = 1, *, first: bool = False
) -> dict[str, Any]:
    """The rows of some architectures, with the compiler's version; or each kernel's first row."""
    wanted = [variant for variant in variants() if variant.arch in architectures]
    if first:
        wanted = list({(v.kernel, v.arch): v for v in reversed(wanted)}.values())
    if workers == 1:
        return {"triton": triton.__version__, "rows": dict(map(compiled, wanted))}
    with ProcessPoolExecutor(workers) as pool:
        rows = dict(pool.map(compiled, wanted, chunksize=4))
    return {"triton": triton.__version__, "rows": rows}


def digest() -> str:
    """Of all that the table depends on, besides Triton: the kernels, and this file."""
    folder = Path(configs.__file__).parent
    sources = [Path(__file__), *sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}, not stdout")
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--first", action="store_true", help="only the first row of each kernel")
    args = parser.parse_args()
    # A row a line, for diffs that can be read.
    workers = (os.cpu_count() or 1) if args.write else 1
    made = table(args.arch, workers, first=args.first)
    rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in made["rows"].items())
    head = f'"triton": {json.dumps(made["triton"])}, "sources": "{digest()}"'
    text = f'{{{head}, "rows": {{\n{rows}\n}}}}\n'
    if args.write:
        TABLE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
