"""Documents that fail the build when they are no longer true."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
GENERATOR = runpy.run_path(str(ROOT / "docs" / "generate_cli.py"))


@pytest.mark.skipif(sys.version_info[:2] > (3, 12), reason="argparse lays its help out differently from 3.13 on")
def test_help_pages_are_fresh() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == GENERATOR["render"](), "docs/cli.md is stale: run `make docs`"


def test_every_subcommand_is_in_the_readme_and_has_examples() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = GENERATOR["subcommands"](GENERATOR["build_parser"]())
    assert set(commands) >= {"plan", "explain", "verify"}
    for name, command in commands.items():
        assert f"autopar {name}" in readme, f"README.md does not mention `autopar {name}`"
        assert "examples:" in command.format_help()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.strip(), "an empty page"
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"dead link: {target}"
    for name in re.findall(r"`((?:autopar|solver|codegen|csrc|docs|examples|tests|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"no such file: {name}"


def test_make_targets_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))}
    assert {"setup", "demo", "test", "test-all", "check", "bench"} <= targets
    assert named <= targets


@pytest.mark.slow
def test_the_demo_ends_well() -> None:
    line = [sys.executable, "examples/demo.py"]
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"demo: ok: loss .* memory predicted within [0-9.]+%", done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    autopar (.+)$", readme, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["plan", "explain", "verify", "predict", "size"]
    for command in commands:
        line = [sys.executable, "-m", "autopar.cli", *shlex.split(command)]
        done = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, f"autopar {command}\n{done.stderr}"
        assert done.stdout.strip()


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda script: script.stem)
def test_a_benchmark_runs_as_it_is_documented(script: Path) -> None:
    """From anywhere, without a search path: what takes modules beside it says first where they are."""
    text = script.read_text(encoding="utf-8")
    beside = re.search(r"^from benchmarks|^import benchmarks", text, re.MULTILINE)
    if beside is not None and 'if __name__ == "__main__"' in text:
        assert "sys.path.insert(0, " in text[: beside.start()], f"{script.name} does not find the modules beside it"
