"""The package as it is installed."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("passes", "ops", "kernels")
SOURCES = (".py", ".c", ".cpp", ".h", ".typed")
WITH_THEM = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md",
             "CITATION.cff")  # fmt: skip


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_linked_for_tools_that_read_the_source(room):
    link = ROOT / "slope_fx" / room
    assert link.is_symlink()
    assert link.resolve() == ROOT / room


def python(program, cwd):
    return subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("room", ["passes", "ops"])
def test_a_second_import_under_the_bare_name_is_refused(room):
    done = python(f"import {room}", ROOT)
    assert f"import this package as slope_fx.{room}" in done.stderr


def test_kernels_under_its_bare_name_is_an_empty_shell():
    """transformers looks for another package of that name, and must go on working."""
    done = python("from kernels import ENGINES", ROOT)
    assert "import slope_fx.kernels, not kernels" in done.stderr
    done = python("import transformers.activations, slope_fx", ROOT)
    assert done.returncode == 0, done.stderr


def run(*command, cwd, **environment):
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": "", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, the wheel made of it (dist/), and one of the tree (direct/).

    All from a copy of the sources: a build folder would hold what an earlier build left.
    """
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("__pycache__")
    for room in ("slope_fx", *ROOMS):
        shutil.copytree(ROOT / room, tree / room, symlinks=True, ignore=ignored)
    for file in WITH_THEM:
        shutil.copy(ROOT / file, tree)
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    run(*build, folder / "dist", tree, cwd=folder)
    run(*build, folder / "direct", "--wheel", tree, cwd=folder)
    return folder


def wheel_in(folder):
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel):
    """Every file by name, less the list of them."""
    archive = zipfile.ZipFile(wheel)
    return {n: archive.read(n) for n in archive.namelist() if not n.endswith("/RECORD")}


def on_disk():
    """What the wheel must hold, by the name it has there."""
    files = {}
    for room in ("slope_fx", *ROOMS):
        prefix = Path("slope_fx") if room == "slope_fx" else Path("slope_fx") / room
        for folder, _, names in os.walk(ROOT / room):  # doesn't follow the links
            for name in names:
                path = Path(folder) / name
                if path.suffix in SOURCES:
                    files[str(prefix / path.relative_to(ROOT / room))] = path.read_bytes()
    return files


def test_the_wheel_holds_every_file_once(built):
    held = contents(wheel_in(built / "dist"))
    of_package = {name: data for name, data in held.items() if ".dist-info/" not in name}
    assert of_package == on_disk()
    assert "slope_fx/kernels/cpu/engine.c" in held
    (license_file,) = [n for n in held if n.endswith(".dist-info/licenses/LICENSE")]
    assert held[license_file] == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_makes_the_same_wheel_as_the_tree(built):
    assert contents(wheel_in(built / "dist")) == contents(wheel_in(built / "direct"))
    (sdist,) = (built / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(WITH_THEM) | {"kernels/cpu/engine.c"} <= names


def readme_snippet():
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]


def snippet_runs_in(environment, tmp_path):
    """The README's code, in an environment that slope_fx was installed into."""
    program = "import slope_fx; print(slope_fx.__file__)\n" + readme_snippet()
    cache = str(tmp_path / "cache")  # so that its own C sources are compiled
    printed = run(
        environment / "bin" / "python", "-c", program, cwd=tmp_path, SLOPE_FX_CACHE_DIR=cache
    )
    assert printed.startswith(str(environment))
    assert "linears are sparse" in printed
    assert "cpu" in printed
    assert list((tmp_path / "cache").iterdir())
    run(environment / "bin" / "slope-fx", "--help", cwd=tmp_path)


@pytest.mark.full
@pytest.mark.inductor
def test_the_wheel_runs_where_it_is_installed(built, tmp_path):
    """In an environment of its own, to which only what slope_fx depends on is lent."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    install = ("install", "--quiet", "--no-deps", "--no-index", "--ignore-installed")
    run(
        sys.executable, "-m", "pip", "--python", environment / "bin" / "python", *install,
        wheel_in(built / "dist"), cwd=tmp_path,
    )  # fmt: skip
    snippet_runs_in(environment, tmp_path)


@pytest.mark.full
def test_the_wheel_runs_in_a_bare_environment(built, tmp_path):
    """With what pip finds for its dependencies, besides torch's version."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    wheel = f"{wheel_in(built / 'dist')}[transformers]"
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    (torch,) = [pin for pin in pins if pin.startswith("torch==")]
    run(environment / "bin" / "pip", "install", "--quiet", torch, wheel, cwd=tmp_path)
    snippet_runs_in(environment, tmp_path)
