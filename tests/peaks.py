"""The measured peak of a training step, beside which predictions are put."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import autopar
from autopar.runtime.memory import measure_peak


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
