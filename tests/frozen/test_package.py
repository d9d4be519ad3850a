"""Packages and exported programs, run by processes that never import slope_fx."""

import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import models
import slope_fx
from architectures import inputs_of, made, shaken
from slope_fx.errors import ArgumentError, ArgumentWarning, StateError, UnsupportedError
from slope_fx.kernels.cpu import build

ROOT = Path(__file__).parents[2]
SHAPES = [(2, 16), (1, 16), (1, 1), (3, 5), (2, 1)]


def batches():
    return [models.batch(i, *shape) for i, shape in enumerate(SHAPES)]


@torch.no_grad()
def oracle(model, inputs):
    """The logits in float64 of the dense model, made before it is frozen."""
    dense = slope_fx.densify(model, "merge").double()
    return [dense(ids).logits for ids in inputs]


def bare(code: str, folder: Path, **variables: str) -> str:
    """Runs code in a process that has PyTorch alone."""
    begin = "import sys, torch\nfrom pathlib import Path\n"
    end = "\nassert not any(name.startswith('slope_fx') for name in sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + code + end], cwd=folder, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", **variables}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def run_bare(folder: Path, inputs=None, **variables: str) -> None:
    """Runs a package in such a process, on the batches or other inputs, into y.pt."""
    torch.save(batches() if inputs is None else inputs, folder / "x.pt")
    code = """
torch.ops.load_library("libslope_fx.so")
model = torch._inductor.aoti_load_package("model.pt2")
torch.save([model(input_ids=ids) for ids in torch.load("x.pt")], "y.pt")
"""
    bare(code, folder, **variables)


def close(got, want):
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """A folder with the package of a Llama, inputs in x.pt, and the oracle's logits."""
    folder = tmp_path_factory.mktemp("package")
    torch.manual_seed(0)
    model = models.awake(models.llama())
    want = oracle(model, batches())
    slope_fx.freeze(model)
    made = slope_fx.package(model, folder / "model.pt2")
    assert made.inputs == {"input_ids": "int64 (a, b)"}
    assert made.outputs == [f"float32 (a, b, {models.VOCABULARY})"]
    assert {path.name for path in folder.iterdir()} == {"model.pt2", "libslope_fx.so"}
    return folder, want


@pytest.mark.inductor
@pytest.mark.full
def test_a_bare_python_runs_the_package(packaged):
    folder, want = packaged
    run_bare(folder)
    close(torch.load(folder / "y.pt"), want)


@pytest.mark.full
@pytest.mark.inductor
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_in_a_package(values, dtype, tmp_path):
    """A bare Python gives what the frozen model gives, to rounding."""
    model = models.awake(models.llama())
    slope_fx.freeze(model, dtype=dtype, values=values, adapter_rank=4)
    want = oracle(model, batches())
    slope_fx.package(model, tmp_path / "model.pt2")
    run_bare(tmp_path)
    for mine, theirs in zip(torch.load(tmp_path / "y.pt"), want, strict=True):
        error = (mine.double() - theirs).abs().max() / theirs.abs().max()
        # Products for few tokens round their inputs to 16-bit integers.
        assert error < (1e-3 if dtype == "float32" else 0.05)


@pytest.mark.full
@pytest.mark.inductor
def test_experts_in_a_package(tmp_path):
    """As many tokens as the example has: the model's code counts them."""
    torch.manual_seed(0)
    model = shaken(made("Mixtral")).eval()
    inputs = inputs_of(model)
    model = models.awake(model, example_inputs=inputs)
    dense = slope_fx.densify(model, "merge")  # experts have no product in float64
    slope_fx.freeze(model)
    slope_fx.package(model, tmp_path / "model.pt2", dynamic=False)
    ids = [models.batch(i, 2, 8) for i in range(2)]
    with torch.no_grad():
        want = [dense(one).logits.double() for one in ids]
    run_bare(tmp_path, ids)
    close(torch.load(tmp_path / "y.pt"), want)
    with pytest.raises(AssertionError):  # other sizes, with the check that the docs name
        run_bare(tmp_path, [models.batch(0, 2, 16)], AOTI_RUNTIME_CHECK_INPUTS="1")


@pytest.mark.inductor
def test_a_process_with_slope_fx_runs_the_package(packaged):
    """Both define the ops."""
    folder, want = packaged
    torch.ops.load_library(folder / "libslope_fx.so")
    torch.ops.load_library(folder / "libslope_fx.so")
    model = torch._inductor.aoti_load_package(folder / "model.pt2")
    close([model(input_ids=ids) for ids in batches()], want)


@pytest.mark.inductor
@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_a_program_in_cpp_runs_the_package(packaged, tmp_path):
    folder, want = packaged
    for command in (
        ["cmake", "-S", ROOT / "examples/cpp", "-B", tmp_path,
         f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"],
        ["cmake", "--build", tmp_path],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    for i in (1, 2):  # one sequence each
        tokens = [str(token) for token in batches()[i][0].tolist()]
        done = subprocess.run(
            [tmp_path / "run_package", folder, *tokens], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"next token: {want[i][0, -1].argmax()}\n"
        logits = torch.frombuffer(
            bytearray((folder / "logits.bin").read_bytes()), dtype=torch.float32
        )
        close([logits.view(1, *want[i].shape[1:])], [want[i]])


@pytest.mark.full
@pytest.mark.inductor
def test_a_package_with_a_cache(tmp_path):
    """It decodes, and begins again from a position."""
    model = models.awake(models.gpt2())
    ids = models.batch(5, 2, 12)
    (want,) = oracle(model, [ids])
    slope_fx.freeze(model)
    before = model.generation_config.to_dict()
    made = slope_fx.package(model, tmp_path / "model.pt2", cache=(2, 16))
    assert list(made.inputs) == ["input_ids", "cache_position"]
    assert model.generation_config.to_dict() == before
    torch.save((ids, [(0, 7), (7, 8), (8, 9), (9, 12), (0, 1), (1, 6), (6, 7)]), tmp_path / "x.pt")
    code = """
torch.ops.load_library("libslope_fx.so")
model = torch._inductor.aoti_load_package("model.pt2")
ids, parts = torch.load("x.pt")
def logits(a, b):
    return model(input_ids=ids[:, a:b].contiguous(), cache_position=torch.arange(a, b))
torch.save([logits(*part) for part in parts], "y.pt")
"""
    bare(code, tmp_path)
    got = torch.load(tmp_path / "y.pt")
    close([torch.cat(got[:4], 1), torch.cat(got[4:], 1)], [want, want[:, :7]])


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_saved_export_runs_without_slope_fx(strict, tmp_path):
    model = models.awake(models.gpt2())
    want = oracle(model, batches())
    slope_fx.freeze(model)
    free = torch.export.Dim.DYNAMIC

    class Logits(nn.Module):  # an output class of transformers can't be loaded without it
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, use_cache):
            return self.model(input_ids, use_cache=use_cache).logits

    with torch.no_grad():
        program = torch.export.export(
            Logits(), (), {"input_ids": models.batch(), "use_cache": False},
            dynamic_shapes={"input_ids": {0: free, 1: free}, "use_cache": None},
            strict=strict,
        )  # fmt: skip
    torch.export.save(program, tmp_path / "model.pt2")
    shutil.copy(build.ops_library(define=True), tmp_path / "libslope_fx.so")
    torch.save(batches(), tmp_path / "x.pt")
    code = """
torch.ops.load_library("libslope_fx.so")
model = torch.export.load("model.pt2").module()
torch.save([model(input_ids=ids, use_cache=False) for ids in torch.load("x.pt")], "y.pt")
"""
    bare(code, tmp_path)
    close(torch.load(tmp_path / "y.pt"), want)
    loaded = torch.export.load(tmp_path / "model.pt2").module()  # and with slope_fx
    close([loaded(input_ids=ids, use_cache=False) for ids in batches()], want)


@pytest.mark.inductor
@pytest.mark.full
def test_any_model_with_parameters_of_its_own(tmp_path):
    """Positional inputs, weights that no nn.Linear holds, and a batch that an example fixes."""
    x = torch.randn(2, 8)
    model = models.awake(models.Plain(), example_inputs=x, skip_head=False)
    inputs = [x, torch.randn(5, 8), torch.randn(1, 8)]
    want = [slope_fx.densify(model).double()(x.double()).detach() for x in inputs]
    slope_fx.freeze(model)
    with pytest.raises(ArgumentError, match="example_inputs are needed"):
        slope_fx.package(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
    made = slope_fx.package(model, tmp_path / "model.pt2", example_inputs=x)
    assert made.inputs == {"x": "float32 (a, 8)"}
    with zipfile.ZipFile(made.path) as archive:
        called = "".join(archive.read(n).decode() for n in archive.namelist() if "json" in n)
    assert "frozen_linear" in called
    assert "frozen_expand" not in called
    torch.ops.load_library(made.library)
    run = torch._inductor.aoti_load_package(made.path)
    close([run(x) for x in inputs], want)
    with pytest.warns(ArgumentWarning, match=r"input x is fixed, dimension 0 at 1"):
        made = slope_fx.package(model, tmp_path / "model.pt2", example_inputs=x[:1])
    assert made.inputs == {"x": "float32 (1, 8)"}


def test_what_cannot_be_packaged_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    model = models.awake(models.llama(), backend="aot_eager")
    with pytest.raises(StateError, match=r"isn't frozen.*slope_fx\.freeze\(model\) first"):
        slope_fx.package(model, path)
    with pytest.raises(StateError, match="compile has not been called"):
        slope_fx.package(models.llama(), path)
    slope_fx.freeze(model)
    with pytest.raises(StateError, match=r"training mode.*eval"):
        slope_fx.package(model.train(), path)
    model.eval()
    for bad in (tmp_path / "model.so", tmp_path / "none" / "model.pt2"):
        with pytest.raises(ArgumentError, match=r"path is.*ends in \.pt2"):
            slope_fx.package(model, bad)
    for cache in (3, (0, 8), (1, 1), (1, 2, 3)):
        with pytest.raises(ArgumentError, match=r"cache is .*largest length"):
            slope_fx.package(model, path, cache=cache)
    with pytest.raises(ArgumentError, match="example_inputs can't be given with cache"):
        slope_fx.package(model, path, cache=(1, 8), example_inputs=models.batch())
    with pytest.raises(UnsupportedError, match=r"torch\.export can't follow"):
        slope_fx.package(model, path, example_inputs=torch.full((2, 3), 0.5))
    plain = models.awake(models.Plain(), example_inputs=torch.randn(2, 8), backend="aot_eager")
    with pytest.raises(ArgumentError, match="cache is for causal language models"):
        slope_fx.package(slope_fx.freeze(plain), path, cache=(1, 8))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnsupportedError, match=r"can't be built here.*no-such-compiler"):
        slope_fx.package(model, path)
    with pytest.raises(UnsupportedError, match="is on meta"):
        slope_fx.package(model.to("meta"), path)
    assert not list(tmp_path.iterdir())


def test_a_failed_compilation_keeps_the_package_that_was_there(tmp_path, monkeypatch):
    model = slope_fx.freeze(models.awake(models.llama(), backend="aot_eager"))
    (tmp_path / "model.pt2").write_text("before")

    def fails(*args, **kwargs):
        raise RuntimeError("no space")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    with pytest.raises(RuntimeError, match="no space"):
        slope_fx.package(model, tmp_path / "model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "before"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86 CPU")
@pytest.mark.full
def test_a_cpu_that_lacks_an_instruction_set_is_told(tmp_path, monkeypatch):
    """fma4 is in no CPU that PyTorch's binaries are made for today."""
    monkeypatch.setattr(build, "_needs", lambda compiler: 'FEATURE("sse2")FEATURE("fma4")')
    build.compile_ops(tmp_path / "libslope_fx.so", define=True)
    code = """
torch.ops.load_library("libslope_fx.so")
x = torch.ones(2, 4)
try:
    torch.ops.slope_fx.frozen_expand(x, x.byte(), None, None, None, [2, 4, 0, 0, 0, 2])
except RuntimeError as error:
    print("raised:", error)
"""
    said = bare(code, tmp_path)
    assert "libslope_fx.so was compiled for a CPU with fma4, which this CPU lacks.\n" in said
    assert "raised: " in said
    assert "Package the model on a machine" in said


def test_a_model_that_trains_is_told_to_be_frozen_for_an_export():
    x = torch.randn(2, 8)
    model = models.awake(models.Plain(), example_inputs=x, backend="aot_eager")
    with pytest.warns(slope_fx.errors.ExpandedWeightWarning, match=r"slope_fx\.freeze\(model\)"):
        torch.export.export(model, (x,))
