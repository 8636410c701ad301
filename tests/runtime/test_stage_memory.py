"""Predicted against measured memory of every pipeline rank: the tracker watches the model of examples/pipeline.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import torchrun
from tests.runtime.memory_ranks import LAYOUTS

RANKS = 4
TOLERANCE = 0.05


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_take_what_was_predicted(layout: str, tmp_path: Path) -> None:
    ended = torchrun(Path(__file__).with_name("memory_ranks.py"), RANKS, str(tmp_path), layout)
    assert ended.returncode == 0, ended.stderr[-4000:]
    for rank in range(RANKS):
        measured, predicted = json.loads((tmp_path / f"{rank}.json").read_text())[layout]
        assert abs(measured - predicted) <= TOLERANCE * measured, f"rank {rank}: {measured} measured, {predicted}"
