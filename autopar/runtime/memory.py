"""Memory of the machine: whether a plan can start here at all, and what a step that really runs takes."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn, optim

from autopar._torch_compat import peak_bytes_by_device
from autopar.errors import AutoparError, RuntimeFailure
from autopar.machine import host_memory_bytes


def check_room(always_bytes: int, devices: int, kind: str) -> None:
    """Raise RuntimeFailure where what a plan holds at all times does not fit this machine, before any of it is made.

    always_bytes: parameters, buffers, inputs and optimizer state of one rank. devices: ranks of the plan.
    """
    ranks = 1 if devices == 1 or kind == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    room = torch.cuda.mem_get_info()[1] if kind == "cuda" else host_memory_bytes()
    if always_bytes * ranks > room:
        where = "the GPU" if kind == "cuda" else "this host"
        raise RuntimeFailure(
            f"the plan holds {always_bytes / 2**30:.4g} GiB of parameters, buffers, inputs and optimizer state on each "
            f"of {ranks} ranks here, {where} has {room / 2**30:.4g} GiB; use more devices (planning needs none), "
            "or lower memory_limit_bytes so that they are stored in shards"
        )


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
