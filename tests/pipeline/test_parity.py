"""Pipelines of all schedules, every rank simulated, against the single device on the global batch."""

from __future__ import annotations

from functools import cache

import pytest

from tests.models import tiny_llama
from tests.pipeline.staged import Whole, staged


@cache
def llama(layers: int, tied: bool) -> Whole:
    return Whole.of(*tiny_llama(layers=layers, tied=tied))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero-bubble"])
def test_llama_in_two_stages(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    staged(llama(2, False), [1, 1], (), 4, monkeypatch).verify(schedule, 2)


def test_tied_embeddings_on_the_ends_of_four_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = staged(llama(4, True), [1, 1, 1, 1], (), 4, monkeypatch)
    tied = "model.embed_tokens.weight"
    users = [s.index for s in cut.program.stages if tied in s.params]
    makers = [s.index for s in cut.program.stages if tied in (*s.grads_early, *s.grads_late)]
    assert users == makers == [0, 3]
    assert cut.program.owners[tied] == 0
    cut.verify("1f1b", 4)


def test_interleaved_stages_that_are_sharded_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    staged(llama(4, True), [1, 1, 1, 1], (2, 2), 2, monkeypatch).verify("interleaved", 2)
