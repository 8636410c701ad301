"""The measured peak of a training step, beside which predictions are put."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

import autopar
from autopar.runtime.memory import measure_peak
from tests.launch import torchrun

TOLERANCE = 0.05


def peak_of_training(program: autopar.Program, batch: Mapping[str, torch.Tensor]) -> int:
    """Most bytes on this rank in a step, its update by AdamW included; a step before it makes the optimizer's state.

    Without Adam's counts of its steps, a float32 a tensor, which no plan predicts.
    """
    optimizer = torch.optim.AdamW(program.parameters())

    def step() -> None:
        program.train_step(**batch)
        optimizer.step()
        optimizer.zero_grad()

    step()
    return measure_peak(step, program, optimizer, *batch.values()) - 4 * len(optimizer.state)


def assert_as_predicted(example: str, processes: int) -> None:
    """On every one of so many processes that run an example, the peak is within 5 % of the plan's."""
    ended = torchrun(Path(__file__).parent / "parity" / "example_memory.py", processes, example)
    assert ended.returncode == 0, ended.stderr[-3000:]
    peaks = [tuple(map(int, found)) for found in re.findall(r"peak (\d+) (\d+)", ended.stdout)]
    assert len(peaks) == processes
    assert all(abs(measured - predicted) <= TOLERANCE * measured for measured, predicted in peaks), peaks
