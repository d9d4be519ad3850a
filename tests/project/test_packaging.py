"""The package as it is installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {
    "slope_fx": "slope_fx",
    "slope_fx.passes": "passes",
    "slope_fx.ops": "ops",
    "slope_fx.kernels": "kernels",
}
FOLDERS = {
    **ROOMS,
    "slope_fx.checkpoints": "slope_fx/checkpoints",
    "slope_fx.integrations": "slope_fx/integrations",
    "slope_fx.kernels.cpu": "kernels/cpu",
    "slope_fx.kernels.triton": "kernels/triton",
    "slope_fx.kernels.cusparselt": "kernels/cusparselt",
}
"""Of every package."""


def configuration():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_the_list_of_packages_is_the_folders_on_disk():
    listed = configuration()
    assert listed["package-dir"] == FOLDERS
    on_disk = {"slope_fx"}
    for package, folder in ROOMS.items():
        inside = (ROOT / folder).rglob("__init__.py")
        links = [ROOT / "slope_fx" / room for room in ("passes", "ops", "kernels")]
        for init in inside:
            if package == "slope_fx" and any(link in init.parents for link in links):
                continue  # seen where they are
            inner = init.parent.relative_to(ROOT / folder)
            on_disk.add(".".join([package, *inner.parts]))
    assert set(listed["packages"]) == on_disk


@pytest.mark.parametrize("room", ["passes", "ops", "kernels"])
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


def test_the_wheel_holds_every_module_once(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", tmp_path, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    want = {"slope_fx/py.typed"}
    for package, folder in FOLDERS.items():
        files = [f for f in (ROOT / folder).iterdir() if f.suffix in (".py", ".c", ".h")]
        want |= {f"{package.replace('.', '/')}/{f.name}" for f in files}
    assert sorted(names) == sorted(want)

    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    program = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import slope_fx, slope_fx.passes\n"
        f"assert slope_fx.__file__.startswith({str(target)!r}), slope_fx.__file__\n"
        f"assert slope_fx.passes.__file__.startswith({str(target)!r})\n"
    )
    done = python(program, tmp_path)
    assert done.returncode == 0, done.stderr
