"""The peak of device memory on each pipeline stage.

parameters, gradients, optimizer state     by ZeRO stage (Rajbhandari et al. 2020)
what is kept for the backward pass          times the micro-batches in flight (Narayanan et al. 2021)
the highest point of a pass above that      from the life of every tensor of the trace
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.layouts import Layout
from autopar.predicting.job import Job
from autopar.predicting.stages import Stage, kept_of, kept_on
from autopar.predicting.table import Part

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


def in_flight(layout: Layout, micro_batches: int, at: int) -> float:
    """Micro-batches whose activations stage `at` holds at once, in units of the whole stage."""
    p, v = layout.pp, layout.vpp
    if p == 1:
        return 1.0
    if layout.schedule == "gpipe":
        return float(micro_batches)
    if layout.schedule == "zero-bubble":  # Qi et al. 2023: gradients of weights wait, and what they read with them
        return float(min(micro_batches, p))
    if v > 1:  # Narayanan et al. 2021: warm-up of 2(p - 1 - at) + (v - 1)p chunks, and the one at work
        return min(micro_batches * v, 2 * (p - 1 - at) + (v - 1) * p + 1) / v
    return float(min(micro_batches, p - at))


def stage_memory(job: Job, stage: Stage, at: int) -> StageMemory:
    """The peak on the ranks of stage `at`."""
    table, layout, precision, run = job.table, job.layout, job.precision, job.run
    weights, numbers, replicas = job.shape.weights, job.numbers(stage), job.data_axis.size
    kept = float(kept_on(stage, table, layout, run) @ weights)
    extra = max((_extra(part, job) for part, _ in stage.parts(table)), default=0.0)
    gathered = 0.0
    if layout.zero == 3 and table.block is not None:
        gathered = 2 * float(table.block.parameters @ weights) * precision.parameter
    beside = precision.parameter if run.accumulates_apart and precision.gradient > precision.parameter else 0
    activations = kept * in_flight(layout, job.micro_batches, at)
    return StageMemory(
        parameters=numbers * precision.parameter / (replicas if layout.zero == 3 else 1) + gathered,
        gradients=numbers * (precision.gradient + beside) / (replicas if layout.zero >= 2 else 1),
        optimizer=numbers * precision.state / (replicas if layout.zero >= 1 else 1),
        activations=activations,
        temporaries=extra,
        allocator=_WORKSPACES + _FRAGMENTATION * activations,
    )


def _extra(part: Part, job: Job) -> float:
    """How far the passes of a part rise above what it keeps."""
    weights = job.shape.weights
    kept = float(kept_of(part, job.table, job.layout, job.run) @ weights)
    again = kept - float(part.gathered @ weights) if job.run.keeps_gathered and job.layout.sp else kept
    forward = float((part.forward.alive @ weights).max()) - again
    backward = float((part.backward.alive @ weights).max()) - again
    return max(0.0, forward, backward)
