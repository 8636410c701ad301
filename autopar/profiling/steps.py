"""What a program spends around its ops: measured on one, against its own prediction."""

from __future__ import annotations

import torch
from torch import nn

from autopar.api import compile
from autopar.cluster import ClusterSpec
from autopar.profiling.clock import Clock

PARAMETERS = 16


class _Scales(nn.Module):
    """As many tiny parameters as anything, and an op for each."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(4)) for _ in range(PARAMETERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for scale in self.scales:
            x = x * scale
        return x.sum()


def measure_parameter_overhead(clock: Clock, cluster: ClusterSpec) -> float:
    """Seconds per trained parameter of a step that its ops do not explain. To be called on all ranks at once.

    cluster: as measured so far. So small a model is not worth a collective, so that every rank computes all of it.
    """
    module, x = _Scales().to(clock.device), torch.ones(2, 4, device=clock.device)
    program = compile(module, cluster, example_inputs=((x,), {}), optimizer="none")
    assert program.plan is not None

    def step(_: int) -> None:
        program.zero_grad()
        program(x).backward()

    expected_s = float(program.plan.predicted["step_time_s"])
    return max(0.0, clock.seconds(step) - expected_s) / PARAMETERS
