"""What Triton's compiler makes of every kernel and configuration, held against a table.

No GPU takes part. A row that differs shows what a change does to the machine code: more
registers, spills, another instruction. If it is meant,
``python tests/helpers/compiled_kernels.py --write`` makes the table anew.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import compiled_kernels  # noqa: E402

TABLE = json.loads(compiled_kernels.TABLE.read_text())
INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
VARIANTS = {variant.row: variant for variant in compiled_kernels.variants()}


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(a, marks=() if a == 90 else pytest.mark.full)
        for a in compiled_kernels.ARCHITECTURES
    ],
)
def test_every_kernel_compiles_to_what_the_table_says(arch, tmp_path):
    """In a process of its own: here kernels may be those of the interpreter.

    The table names the sources that it was made from. While those are the ones that are here, and
    Triton is the one that made it, the first row of each kernel is proof enough.
    """
    known = (TABLE["triton"], TABLE["sources"]) == (triton.__version__, compiled_kernels.digest())
    some = ["--first"] if known else []
    done = _without_interpreter(tmp_path, compiled_kernels.__file__, "--arch", str(arch), *some)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout)["rows"]
    every = {row: variant for row, variant in VARIANTS.items() if variant.arch == arch}
    if known:
        assert {every[row].kernel for row in made} == set(compiled_kernels.KERNELS)
    else:
        assert set(made) == set(every)
    if triton.__version__ != TABLE["triton"]:
        pytest.skip(f"all compiled; the table is of triton {TABLE['triton']}")
    differing = [f"{k}: {v}, not {TABLE['rows'].get(k)}" for k, v in made.items()
                 if v != TABLE["rows"].get(k)]  # fmt: skip
    assert not differing, "\n".join(differing)


@pytest.mark.full
def test_launches_pass_through_triton_as_on_a_gpu(tmp_path):
    """The very arguments of the launches, of awkward sizes: bound, specialised, compiled."""
    script = Path(__file__).parents[1] / "helpers" / "launch_kernels.py"
    done = _without_interpreter(tmp_path, script, "--compile-only")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) >= 31


def test_the_table_has_every_variant():
    assert set(TABLE["rows"]) == set(VARIANTS)
    assert {variant.kernel for variant in VARIANTS.values()} == set(compiled_kernels.KERNELS)


def test_the_tensor_cores_are_used_as_meant():
    """The largest instruction wherever the tile has the 64 rows it needs."""
    for row, variant in VARIANTS.items():
        if variant.kernel not in compiled_kernels.DOTS:
            assert TABLE["rows"][row]["mma"] == "", row
            continue
        side = "BLOCK_OUT" if variant.kernel in ("linear", "weight_grad") else "BLOCK_TOKENS"
        arch = variant.arch if variant.config[side] >= 64 else 80
        assert TABLE["rows"][row]["mma"] == INSTRUCTIONS[arch], row


def test_nothing_spills():
    """Eight bytes of stack are where a permutation keeps two addresses, no spill."""
    assert all(row["stack"] <= 8 for row in TABLE["rows"].values())


def test_shared_memory_fits():
    """Two programs a multiprocessor for what is bound by memory, one at least for the rest."""
    limits = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
    for row, variant in VARIANTS.items():
        share = 1 if variant.kernel in compiled_kernels.DOTS else 2
        assert TABLE["rows"][row]["shared"] <= limits[variant.arch] / share, row


def test_kernels_are_all_there():
    """A kernel that is written but not compiled here would be a hole in the proof."""
    folder = Path(compiled_kernels.configs.__file__).parent
    text = "".join(path.read_text() for path in folder.glob("*.py") if path.name != "tiles.py")
    names = [line.split("(")[0][4:] for line in _after_jit(text)]
    kernels = {name for name in names if not name.startswith("_")}
    assert kernels == set(compiled_kernels.KERNELS)


def _without_interpreter(cache: Path, *command) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def _after_jit(text: str) -> list[str]:
    lines = text.splitlines()
    return [after for line, after in itertools.pairwise(lines) if line == "@triton.jit"]
