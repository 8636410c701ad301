"""Measures the memory of a step that really runs, to hold against what the plan predicted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn, optim

from autopar._torch_compat import peak_bytes_by_device
from autopar.errors import AutoparError


def measure_peak(step: Callable[[], object], *externals: nn.Module | optim.Optimizer | torch.Tensor) -> int:
    """Peak bytes of tensors on this rank (on the device that holds most) while `step()` runs once.

    externals: what is there before the step and counts too: the program (its parameters, their gradients and its
        buffers), the optimizer (its state) and the batch. Run the step once before, so that the optimizer
        has its state, and set gradients to None.
    """
    found = peak_bytes_by_device(step, externals)
    if not found:
        raise AutoparError("measure_peak saw no tensor: pass the program, its optimizer and the batch after the step")
    return max(found.values())
