"""Passes of a benchmark that sleep instead of computing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch

from autopar.runtime.stage import Stage
from autopar.simulating.schedules import FORWARD
from benchmarks.slept_passes import SleptPasses

SIDE = 50


@dataclass
class Pass:
    """A pass by itself."""

    run: Callable[[list[Any]], Any]


@dataclass
class OneStage:
    """As much of a stage as is looked at."""

    passes: dict[str, Pass]
    stage_index: int = 3


def test_a_pass_runs_once_and_sleeps_for_its_operations_from_then_on() -> None:
    ran = []

    def run(inputs: list[Any]) -> list[torch.Tensor]:
        ran.append(1)
        return [inputs[0] @ inputs[0]]

    stage = OneStage({FORWARD: Pass(run)})
    slept = SleptPasses([cast(Stage, stage)], flops_per_s=2 * SIDE**3 / 0.1)
    for _ in range(2):
        inputs = [torch.ones(SIDE, SIDE)]
        begin_s = time.perf_counter()
        (found,) = stage.passes[FORWARD].run(inputs)
        seconds = time.perf_counter() - begin_s
    assert slept.flops == {(FORWARD, 3): 2 * SIDE**3}
    assert ran == [1]
    assert not inputs
    assert found.shape == (SIDE, SIDE)
    assert not found.any()
    assert seconds == pytest.approx(0.1, rel=1)
    assert seconds >= 0.1
