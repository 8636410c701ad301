"""The example of a long sequence, on four real processes: it compares itself with one device."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import torchrun

EXAMPLE = Path(__file__).parents[2] / "examples" / "long_sequence.py"


@pytest.mark.parametrize("tokens", ["256", pytest.param("4096", marks=pytest.mark.slow)])
def test_four_processes_equal_one(tokens: str) -> None:
    ended = torchrun(EXAMPLE, 4, "--tokens", tokens)
    assert ended.returncode == 0, ended.stderr[-4000:] + ended.stdout[-1000:]
    assert "attention goes around a ring" in ended.stdout  # four ranks do not divide the heads
    assert "long_sequence: ok" in ended.stdout
