"""Stages on real processes: every schedule gives the loss and the gradients of one device."""

from __future__ import annotations

import json
from pathlib import Path

from tests.launch import torchrun
from tests.runtime.chain_ranks import CASES

RANKS = 3


def test_a_chain_of_stages_equals_one_device(tmp_path: Path) -> None:
    ended = torchrun(Path(__file__).with_name("chain_ranks.py"), RANKS, str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-4000:]
    for rank in range(RANKS):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == CASES.keys()
        assert all(value <= 1e-12 for value in found.values()), f"rank {rank}: {found}"
