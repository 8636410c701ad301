"""The peak of device memory on each pipeline stage.

parameters, gradients, optimizer state     by ZeRO stage (Rajbhandari et al. 2020)
what is kept for the backward pass          times the micro-batches in flight (Narayanan et al. 2021)
the highest point of a pass above that      from the life of every tensor of the trace
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autopar.layouts import Layout
from autopar.predicting.job import Job, Replicas
from autopar.predicting.stages import Stage, kept_of, kept_on
from autopar.predicting.table import Part
from autopar.predicting.work import Work

# What a step takes beyond its tensors. All fitted to every other run of eager training with nanotron on H100, by the
# peak of its first stage, which is what it logs (benchmarks/data/h100_sweep.json); the other half is as close. So was
# `Run.fragmentation`.
_WORKSPACES = 192 << 20  # of cuBLAS and the like
_AT_PEAK = 0.78  # of a micro-batch's own gradients, and of what ZeRO gathers: there while most of what was kept is
_IN_FLIGHT = 2.25  # whole activations beside what is kept, for each micro-batch in flight, with tensor parallelism
# A buffer of a collective comes back to torch's allocator when the device is done with it, not the host. A host that is
# ahead of the device (as far as about a thousand launches, CUDA's queue) has made so many more by then ...
_AHEAD = 49.0  # whole activations
_AHEAD_FROM, _AHEAD_TO = 0.7, 1.0  # ... where the device takes this share of the host's time
_AHEAD_ROOM = 0.8  # of a device's memory: beyond it the allocator waits for buffers instead of asking for more


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
    weights, held = job.weights, job.held(stage)
    kept = float(kept_on(stage, table, layout, run) @ weights)
    kinds = {id(part.forward): part for part, _ in stage.parts(table)}.values()
    extra = max((rise for part in kinds for rise in (0.0, *rises(part, job))), default=0.0)
    gathered = 0.0
    if layout.zero == 3 and table.kinds:
        gathered = 2 * max(float(block.parameters @ weights) for block in table.kinds) * precision.parameter
    flights = in_flight(layout, job.micro_batches, at)
    found = StageMemory(
        parameters=_own(held, layout.zero == 3) * precision.parameter + gathered,
        gradients=sum(_gradients(job, one) for one in held),
        optimizer=_state_numbers(job, stage) * precision.state,
        activations=kept * flights,
        temporaries=extra,
        allocator=_WORKSPACES + run.fragmentation * kept * flights,
    )
    return replace(found, allocator=found.allocator + _buffers(job, stage, flights, found.total))


def _own(held: tuple[Replicas, ...], parted: bool) -> float:
    """Numbers that a rank has. parted: each of those that could have all has a part."""
    return sum(one.numbers / (one.axis.size if parted else 1) for one in held)


def _gradients(job: Job, of: Replicas) -> float:
    """Bytes of gradients on a rank."""
    precision, zero, beside = job.precision, job.layout.zero, 0.0
    if job.run.accumulates_apart and precision.gradient > precision.parameter:
        beside = precision.parameter * (_AT_PEAK + _copied(zero) * (of.axis.size > 1))
    whole = 0.0  # with ZeRO stage 2, those of a chunk are whole until they are reduced
    if zero == 2 and job.layout.vpp > 1 and of.axis.size > 1:
        whole = of.numbers / job.layout.vpp * precision.gradient
    return _own((of,), zero >= 2) * (precision.gradient + beside) + whole


def _state_numbers(job: Job, stage: Stage) -> float:
    """Parameters whose state is on the device at once: all, or, offloaded, those of one part of the model."""
    if job.layout.offload != "optimizer":
        return job.owned(job.held(stage))
    there = (part.parameters for part, times in stage.parts(job.table) if times)
    return max((job.owned(job.replicas(one)) for one in there), default=0.0)


def _buffers(job: Job, stage: Stage, flights: float, others: float) -> float:
    """Bytes of buffers of collectives that are waiting to be used again. others: bytes of all else."""
    if not job.run.holds_buffers or job.layout.tp == 1:
        return 0.0
    whole = float(job.table.boundary @ replace(job.shape, sequence=False).weights)
    room = max(0.0, _AHEAD_ROOM * job.cluster.device.usable_bytes - others)
    return _IN_FLIGHT * flights * whole + min(_AHEAD * _ahead(job, stage) * whole, room)


def _ahead(job: Job, stage: Stage) -> float:
    """How far the host is ahead of the device, 0 to 1."""
    work = Work()
    for part, times in stage.parts(job.table):
        for one in (part.forward, part.backward):
            work += job.pricer.work(one, job.shape) * times
    share = (work.kernels_s + work.messages_s) / work.host_s if work.host_s else _AHEAD_TO
    return min(1.0, max(0.0, (share - _AHEAD_FROM) / (_AHEAD_TO - _AHEAD_FROM)))


def _copied(zero: int) -> float:
    """The share of gradients or parameters that is there a second time, for the ranks that share them.

    Without ZeRO the buckets of DistributedDataParallel, always; else what the ranks gather.
    """
    return 1.0 if zero == 0 else _AT_PEAK


def rises(part: Part, job: Job) -> tuple[float, float]:
    """How far the forward and the backward pass of a part rise above what it keeps."""
    weights = job.weights
    kept = float(kept_of(part, job.table, job.layout, job.run) @ weights)
    again = kept - float(part.gathered @ weights) if job.run.keeps_gathered and job.layout.sp else kept
    forward, backward = ((of.alive @ weights).max() for of in (part.forward, part.backward))
    return float(forward) - again, float(backward) - again
