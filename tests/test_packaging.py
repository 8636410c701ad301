"""What a user installs: wheel, sdist and editable install all bring autopar.solver and autopar.codegen.

Everything is built from a copy of the tree, so that nothing stale in build/ can help or harm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    *("autopar", "solver", "codegen", "setup.py", "pyproject.toml", "MANIFEST.in", "constraints.txt"),
    *("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
]
# Imports run outside the tree; the libraries come from this environment, autopar does not:
# an editable install's import hook is active only in the site-packages of its own interpreter.
LIBRARIES = sysconfig.get_path("purelib")
PROBE = """
import pathlib, sys
import autopar, autopar.codegen, autopar.cost, autopar.solver.problem
assert "torch" not in sys.modules
here = pathlib.Path(autopar.__file__).parent
assert pathlib.Path(autopar.solver.problem.__file__).parent == here / "solver", autopar.solver.problem.__file__
print(here)
"""


def run(*command: str | Path, cwd: Path, pythonpath: str) -> str:
    """Run a command; its output. A failure shows all it printed."""
    environment = {**os.environ, "PYTHONPATH": pythonpath, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of what a clone has, links kept as links."""
    copy = tmp_path_factory.mktemp("tree") / "autopar"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


def build(tree: Path, kind: str, target: Path) -> Path:
    """Build a "wheel" or an "sdist" of `tree` with this environment's setuptools."""
    script = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    run(sys.executable, "-c", script, cwd=tree, pythonpath="")
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, "sdist", tmp_path_factory.mktemp("sdist"))


def expected_files(tree: Path) -> set[str]:
    """Every Python and data file of the package, as a user's import path sees it."""
    patterns = ("*.py", "*.json", "*.j2", "py.typed")
    found: set[str] = set()
    for folder, prefix in (("autopar", "autopar"), ("solver", "autopar/solver"), ("codegen", "autopar/codegen")):
        for pattern in patterns:
            for path in (tree / folder).rglob(pattern):
                inside = path.relative_to(tree / folder)
                if folder != "autopar" or inside.parts[0] not in ("solver", "codegen"):
                    found.add(f"{prefix}/{inside.as_posix()}")
    return found


def test_wheel_has_every_file_and_one_package(tree: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert not expected_files(tree) - names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"autopar"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_has_every_file(tree: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    wanted = expected_files(tree) | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    assert not wanted - names


@pytest.mark.parametrize("kind", ["wheel", "sdist", "tree"])
def test_install_imports_the_linked_packages(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source: Path = request.getfixturevalue(kind)
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", target)
    run(*pip, source, cwd=tmp_path, pythonpath="")
    # -S: without this interpreter's site-packages, where the tree itself may be installed.
    where = run(sys.executable, "-S", "-c", PROBE, cwd=tmp_path, pythonpath=f"{target}{os.pathsep}{LIBRARIES}")
    assert where.strip() == str(target / "autopar")


def test_editable_install_and_console_script(tree: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path, pythonpath="")
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation")
    # The libraries come last on the path: the editable install of this environment must not be found first.
    (site,) = home.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(LIBRARIES + "\n")
    run(*pip, "-e", tree, cwd=tmp_path, pythonpath="")
    where = run(python, "-c", PROBE, cwd=tmp_path, pythonpath="")
    assert where.strip() == str(tree / "autopar")
    assert "usage: autopar" in run(home / "bin" / "autopar", "--help", cwd=tmp_path, pythonpath="")
