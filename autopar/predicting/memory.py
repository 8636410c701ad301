"""The peak of device memory on each pipeline stage.

parameters, gradients, optimizer state     by ZeRO stage (Rajbhandari et al. 2020)
what is kept for the backward pass          times the micro-batches in flight (Narayanan et al. 2021)
the highest point of a pass above that      from the life of every tensor of the trace
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.cost.dtypes import itemsize
from autopar.layouts import Layout
from autopar.predicting.run import Run
from autopar.predicting.sizes import Floats, Shape
from autopar.predicting.stages import Stage, kept_of, kept_on
from autopar.predicting.table import ModelTable, Part

# What a step takes beyond its tensors: blocks of the caching allocator cut to the wrong size, and workspaces of cuBLAS
# and NCCL. Of eager training with nanotron on H100 (benchmarks/data/h100_sweep.json), whose tensors alone are
# short of the measured peaks by these on average.
_FRAGMENTATION = 0.3  # of what is kept from forward to backward
_WORKSPACES = 1 << 30


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank of a stage, at its peak."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    temporaries: float
    allocator: float

    @property
    def total(self) -> float:
        """All of it."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.temporaries + self.allocator


@dataclass(frozen=True)
class Precision:
    """Bytes of one number: a parameter, its gradient as it is summed, the optimizer's state with the master copy."""

    parameter: int
    gradient: int
    state: int

    @staticmethod
    def of(table: ModelTable, layout: Layout, states_per_param: int) -> Precision:
        """Narrow parameters have a master copy in float32 (Micikevicius et al. 2018), and state in float32."""
        gradient = table.itemsize if layout.grad_dtype is None else itemsize(layout.grad_dtype)
        gradient = max(gradient, table.itemsize) if table.itemsize > 4 else gradient
        master = 4 if table.itemsize < 4 and states_per_param else 0
        return Precision(table.itemsize, gradient, master + states_per_param * max(4, table.itemsize))


def local_numbers(table: ModelTable, stage: Stage, shape: Shape) -> float:
    """Parameters (numbers) that one rank of the stage computes with; tied ones once where one stage has both uses."""
    weights = shape.weights
    numbers = sum(times * float(part.parameters @ weights) for part, times in stage.parts(table))
    if stage.first and stage.last:
        numbers -= float(table.after.tied @ weights)
    return numbers


def in_flight(layout: Layout, micro_batches: int, at: int) -> float:
    """Micro-batches whose activations stage `at` holds at once, in units of the whole stage."""
    p, v = layout.pp, layout.vpp
    if p == 1:
        return 1.0
    if layout.schedule == "gpipe":
        return float(micro_batches)
    if v > 1:  # Narayanan et al. 2021: warm-up of 2(p - 1 - at) + (v - 1)p chunks, and the one at work
        return min(micro_batches * v, 2 * (p - 1 - at) + (v - 1) * p + 1) / v
    return float(min(micro_batches, p - at))


def stage_memory(
    table: ModelTable,
    stage: Stage,
    at: int,
    layout: Layout,
    shape: Shape,
    micro_batches: int,
    precision: Precision,
    run: Run,
) -> StageMemory:
    """The peak on the ranks of stage `at`."""
    weights = shape.weights
    numbers = local_numbers(table, stage, shape)
    replicas = layout.dp * layout.cp
    kept = float(kept_on(stage, table, layout, run) @ weights)
    extra = max((_extra(part, table, layout, weights, run) for part, _ in stage.parts(table)), default=0.0)
    gathered = 0.0
    if layout.zero == 3 and table.block is not None:
        gathered = 2 * float(table.block.parameters @ weights) * precision.parameter
    beside = precision.parameter if run.accumulates_apart and precision.gradient > precision.parameter else 0
    activations = kept * in_flight(layout, micro_batches, at)
    return StageMemory(
        parameters=numbers * precision.parameter / (replicas if layout.zero == 3 else 1) + gathered,
        gradients=numbers * (precision.gradient + beside) / (replicas if layout.zero >= 2 else 1),
        optimizer=numbers * precision.state / (replicas if layout.zero >= 1 else 1),
        activations=activations,
        temporaries=extra,
        allocator=_WORKSPACES + _FRAGMENTATION * activations,
    )


def _extra(part: Part, table: ModelTable, layout: Layout, weights: Floats, run: Run) -> float:
    """How far the passes of a part rise above what it keeps."""
    kept = float(kept_of(part, table, layout, run) @ weights)
    again = kept - float(part.gathered @ weights) if run.keeps_gathered and layout.sp else kept
    forward = float((part.forward.alive @ weights).max()) - again
    backward = float((part.backward.alive @ weights).max()) - again
    return max(0.0, forward, backward)
