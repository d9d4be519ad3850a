"""How the CPU engine's library comes to be: compiled, cached, refused, shared, forked."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slope_fx.kernels import ENGINES
from slope_fx.kernels.cpu import build

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
cpu = ENGINES["cpu"]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

PRODUCT = """
import torch
from slope_fx.kernels import ENGINES
cpu = ENGINES["cpu"]
mask = cpu.magnitude_mask(torch.rand(64, 64), 2, 4)
y = cpu.sparse_linear(torch.rand(40, 64), torch.rand(64, 32), mask, None, 2, 4)
"""
"""A product on as many threads as torch has."""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.full
@needs_compiler
def test_two_processes_race_for_an_empty_cache(tmp_path):
    cache = str(tmp_path / "cache")
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", PRODUCT], env={**os.environ, "SLOPE_FX_CACHE_DIR": cache}
        )
        for _ in range(2)
    ]
    assert [process.wait(300) for process in racing] == [0, 0]
    left = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert [name for name in left if name.endswith(".so")] == left  # nothing partial
    assert len(left) == 1
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a build that has not been tried yet."""
    path = tmp_path / "cache"
    monkeypatch.setenv("SLOPE_FX_CACHE_DIR", str(path))
    build._library_or_error.cache_clear()
    build.library.cache_clear()
    yield path
    build._library_or_error.cache_clear()
    build.library.cache_clear()


def test_a_cache_that_others_may_write_to_is_refused(cache):
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(build.BuildError, match=r"other users can write to .*chmod go-w"):
        build.library()
    assert "chmod go-w" in cpu.why_not(torch.device("cpu"), torch.float32)


@needs_compiler
def test_a_library_that_others_may_write_to_is_not_loaded(cache):
    build.library()
    (library,) = cache.glob("*.so")
    library.chmod(0o722)
    build._library_or_error.cache_clear()
    build.library.cache_clear()
    with pytest.raises(build.BuildError, match="other users can write"):
        build.library()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no users here")
def test_a_cache_of_another_user_is_refused(cache, monkeypatch):
    cache.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(build.BuildError, match="belongs to another user"):
        build.library()


@needs_compiler
@pytest.mark.full
def test_a_changed_source_flag_or_cpu_is_another_library(cache, monkeypatch):
    build.library()
    monkeypatch.setattr(build, "cpu_identity", lambda: "another CPU")
    build._library_or_error.cache_clear()
    build.library.cache_clear()
    build.library()
    assert len(list(cache.glob("*.so"))) == 2


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nowhere"}, "there is no C compiler"),
        pytest.param(
            {"CC": "no-such-compiler"}, "'no-such-compiler' (from CC)", marks=pytest.mark.full
        ),
        pytest.param({"CC": "/bin/false"}, "/bin/false", marks=pytest.mark.full),
    ],
)
def test_without_a_compiler_dense_serves_and_it_is_said_once(tmp_path, environment, reason):
    program = """
import warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import torch, slope_fx
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model = slope_fx.compile(layer, example_inputs=torch.rand(2, 8), backend="aot_eager")
    for _ in range(2):
        model(torch.rand(2, 8)).sum().backward()
told = [str(w.message) for w in told if issubclass(w.category, slope_fx.errors.EngineWarning)]
assert len(told) == 1, told
print(told[0])
print({p.engine for r in slope_fx.explain(model).sparse for p in r.products})
try:
    slope_fx.compile(torch.nn.Linear(8, 8), engine="cpu", example_inputs=torch.rand(2, 8))
except slope_fx.errors.SlopeError as error:
    print(error)
"""
    cache = str(tmp_path / "cache")
    done = run(program, SLOPE_FX_CACHE_DIR=cache, SLOPE_FX_ENGINES="", **environment)
    assert done.returncode == 0, done.stderr
    warning, engines, error = done.stdout.splitlines()
    assert reason in warning
    assert engines == "{'dense'}"
    assert error.startswith("engine='cpu' is not available")


@needs_compiler
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.full)])
def test_workers_compute_what_their_parent_does(method, tmp_path):
    """A forked child can't use the parent's OpenMP threads; it must not wait for them."""
    (tmp_path / "program.py").write_text(f"""
import torch, torch.multiprocessing as mp
{PRODUCT}
def work(values, mask, x, queue):
    queue.put(cpu.sparse_linear(x, values, mask, None, 2, 4).tolist())

if __name__ == "__main__":
    values, x = torch.rand(64, 32), torch.rand(40, 64)
    want = cpu.sparse_linear(x, values, mask, None, 2, 4)
    context = mp.get_context({method!r})
    queue = context.SimpleQueue()
    process = context.Process(target=work, args=(values, mask, x, queue))
    process.start()
    assert queue.get() == want.tolist()
    process.join()
    assert torch.equal(cpu.sparse_linear(x, values, mask, None, 2, 4), want)
""")
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], env={**os.environ, "OMP_NUM_THREADS": "2"},
        timeout=120, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


class Products(torch.utils.data.Dataset):
    """Items that a worker computes with the engine."""

    def __init__(self):
        self.values, self.x = torch.rand(64, 32), torch.rand(40, 64)
        self.mask = cpu.magnitude_mask(torch.rand(64, 64), 2, 4)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return cpu.sparse_linear(self.x + index, self.values, self.mask, None, 2, 4)


@needs_compiler
def test_data_loader_workers():
    torch.set_num_threads(2)
    items = Products()
    want = [items[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(items, batch_size=None, num_workers=2)
    assert all(torch.equal(a, b) for a, b in zip(loader, want, strict=True))


VARIANTS: list[Any] = ["native"]
if platform.machine() in ("x86_64", "AMD64"):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    full = pytest.mark.full  # x86-64-v4 is near to native, where that has AVX-512
    VARIANTS += [pytest.param("x86-64-v4", marks=full)] if "avx512vl" in flags else []
    VARIANTS += [pytest.param("x86-64-v3", marks=full)] if "avx2" in flags else []
    VARIANTS.append(pytest.param("x86-64", marks=full))


@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS)
def test_fuzz_under_sanitizers(variant, tmp_path):
    """Each vector width that this machine has, 16 lanes to 4."""
    program = tmp_path / "fuzz"
    tuning = ("-march=" if platform.machine() == "x86_64" else "-mcpu=") + variant
    built = subprocess.run(
        [COMPILER, "-std=gnu11", "-O0", "-g", tuning, "-fopenmp", "-Wall", "-Wextra", "-Werror",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
         "-o", program, HERE / "fuzz_cpu_engine.c", "-lm"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "libasan" in built.stderr or "libubsan" in built.stderr:
        pytest.skip("the compiler has no sanitizers here")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program, "60", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failures" in done.stdout
