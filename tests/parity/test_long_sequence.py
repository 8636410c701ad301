"""The example of a long sequence, on four real processes: it compares itself with one device."""

from __future__ import annotations

from pathlib import Path

from tests.launch import torchrun

EXAMPLE = Path(__file__).parents[2] / "examples" / "long_sequence.py"


def test_four_processes_equal_one() -> None:
    ended = torchrun(EXAMPLE, 4, "--tokens", "256")
    assert ended.returncode == 0, ended.stderr[-4000:] + ended.stdout[-1000:]
    assert "long_sequence: ok" in ended.stdout
