"""Seconds of one training step of a layout, and what they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.cost.collectives import MeshAxis, collective_time_s
from autopar.layouts import Layout
from autopar.predicting.borders import borders_s
from autopar.predicting.job import Job
from autopar.predicting.pauses import paused_s
from autopar.predicting.reductions import reduce_s, zero3_s
from autopar.predicting.stages import Stage, StageWork, stage_work
from autopar.predicting.work import Work


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, on the critical path. flops, again_flops: of the busiest rank."""

    forward_s: float
    backward_s: float
    recompute_s: float
    tensor_messages_s: float
    bubble_s: float
    send_s: float
    gradients_s: float
    gathers_s: float
    optimizer_s: float
    flops: float
    again_flops: float
    offload_s: float = 0.0
    expert_messages_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All of it."""
        parts = (self.forward_s, self.backward_s, self.recompute_s, self.tensor_messages_s, self.bubble_s)
        return (
            sum(parts)
            + self.expert_messages_s
            + self.send_s
            + self.gradients_s
            + self.gathers_s
            + self.optimizer_s
            + self.offload_s
        )


@dataclass(frozen=True, eq=False)
class _Held:
    """A stage, priced by the degrees of its own ranks."""

    job: Job
    stage: Stage
    work: StageWork
    gathers_s: float

    @staticmethod
    def of(job: Job, stage: Stage) -> _Held:
        work = stage_work(job.table, stage, job.layout, job.pricer, job.shape)
        work = _with_accumulation(job, stage, work)
        return _Held(job, stage, work, zero3_s(job, stage, work))


def step_time(layout: Layout, jobs: list[Job], stages: Sequence[Stage]) -> StepTime:
    """Price one step. jobs: the layout as each stage has it, one and the same where they are alike."""
    known: dict[tuple[int, Stage], _Held] = {}  # many stages are alike
    for job, stage in zip(jobs, stages, strict=True):
        if (id(job), stage) not in known:
            known[id(job), stage] = _Held.of(job, stage)
    every = [known[id(job), stage] for job, stage in zip(jobs, stages, strict=True)]
    slow = max(every, key=lambda one: _seconds(one.work) + one.gathers_s)
    job, worst, n = slow.job, slow.work, slow.job.micro_batches
    distinct, between_s = list({id(one): one for one in jobs}.values()), borders_s(layout, jobs)
    send_s = max(sum(send_parts_s(one)) for one in distinct)
    passes = (worst.forward, worst.backward, worst.again)
    expert_s = sum(work.expert_s for work in passes)
    return StepTime(
        forward_s=n * _own(worst.forward),
        backward_s=n * _own(worst.backward),
        recompute_s=n * _own(worst.again),
        tensor_messages_s=n * (sum(work.messages_s for work in passes) - expert_s),
        expert_messages_s=n * expert_s,
        bubble_s=_bubble_s(every, slow, send_s) + sum(between_s),
        send_s=_sends_s(job, worst, send_s) + max(map(paused_s, distinct)) + n * max(between_s, default=0.0),
        gradients_s=max(reduce_s(one.job, one.stage, one.work) for one in known.values()),
        gathers_s=n * slow.gathers_s,
        optimizer_s=max(optimizer_s(one.job, one.stage) for one in known.values()),
        flops=n * (worst.forward.flops + worst.backward.flops),
        again_flops=n * worst.again.flops,
        offload_s=2 * max(state_copy_s(one.job, one.stage) for one in known.values()),
    )


def _own(work: Work) -> float:
    """Without the collectives."""
    return max(work.kernels_s, work.host_s - work.messages_s)


def _seconds(work: StageWork) -> float:
    return work.forward.seconds + work.whole_backward.seconds


def _with_accumulation(job: Job, stage: Stage, work: StageWork) -> StageWork:
    """Each micro-batch's gradients are read and added to their sum, which is read and written."""
    adding = Work(kernels_s=accumulation_s(job, job.numbers(stage)))
    return StageWork(work.forward, work.backward + adding, work.again)


def accumulation_s(job: Job, numbers: float) -> float:
    """To add so many gradients of one micro-batch to their sum, where that takes a kernel of its own."""
    if not job.run.accumulates_apart:
        return 0.0
    return job.streaming_s(numbers * (job.precision.parameter + 2 * job.precision.gradient))


def _bubble_s(every: list[_Held], slow: _Held, send_s: float) -> float:
    """What a pipeline adds to the slowest stage's own work: one micro-batch through all the others, both ways.

    Interleaved stages make it 1/vpp of that (Narayanan et al. 2021).
    """
    layout = slow.job.layout
    if layout.pp == 1:
        return 0.0
    around_s = {one: _around_s(one.job, one.stage, one.work) for one in {*every}}
    others_s = sum(around_s[one] for one in every) - around_s[slow]
    return others_s / layout.vpp + 2 * (layout.pp - 1) * send_s


def _around_s(job: Job, stage: Stage, work: StageWork) -> float:
    """What one stage adds to the bubble of the others.

    Zero-bubble fills it with gradients of weights: forward + inputs - weights is left (Qi et al. 2023, ZB-H1), at least
    the forward pass. Fewer micro-batches than other stages have fewer of them to fill it with.
    """
    if job.layout.schedule != "zero-bubble":
        return _seconds(work)
    inputs = Work()
    for part, times in stage.parts(job.table):
        inputs += job.pricer.work(part.backward.input_gradients, job.shape) * times
    filled = min(1.0, job.micro_batches / (job.layout.pp - 1))
    left_s = inputs.seconds - filled * (work.backward.seconds - inputs.seconds)
    return work.forward.seconds + work.again.seconds + max(0.0, left_s)


def _sends_s(job: Job, worst: StageWork, send_s: float) -> float:
    """Seconds in which a stage waits for what others send, but for the first micro-batch's way, which is the bubble's.

    Interleaved stages have another chunk to work on meanwhile.
    """
    layout = job.layout
    if layout.pp == 1:
        return 0.0
    hidden = (0.0, 0.0)
    if layout.vpp > 1 and job.run.overlaps_sends:
        hidden = (worst.forward.seconds / layout.vpp, worst.whole_backward.seconds / layout.vpp)
    return job.micro_batches * layout.vpp * sum(max(0.0, send_s - one) for one in hidden)


def send_parts_s(job: Job) -> tuple[float, float]:
    """One micro-batch's activations to the next stage: on the pipeline axis, and what the tensor axis does with them.

    Without sequence parallelism each rank of a tensor group sends its part, which is gathered there (Narayanan et al.
    2021, section 4.1).
    """
    layout, cluster = job.layout, job.cluster
    if layout.pp == 1:
        return 0.0, 0.0
    nbytes = float(job.table.boundary @ job.weights)
    if layout.tp == 1 or layout.sp:
        return collective_time_s("permute", nbytes, job.pipeline_axis, cluster), 0.0
    gather_s = collective_time_s("all_gather", nbytes, MeshAxis(layout.tp, 1), cluster)
    return collective_time_s("permute", nbytes / layout.tp, job.pipeline_axis, cluster), gather_s


def optimizer_s(job: Job, stage: Stage) -> float:
    """Every pass of the optimizer over its share reads and writes memory, and nothing else counts.

    Gradients: read for their norm, read and written to clip them, read by the update; in float16 read and written once
    more to take the loss scale out. State: read and written. A master copy is read again to write the parameter.
    """
    gradient_passes = 4 + (2 if job.table.dtype == "float16" else 0)
    copied, precision = 4 if job.table.itemsize < 4 else 0, job.precision
    nbytes = gradient_passes * precision.gradient + 2 * precision.state + copied + precision.parameter
    return job.streaming_s(job.owned(job.held(stage)) * nbytes)


def state_copy_s(job: Job, stage: Stage) -> float:
    """The optimizer's state of a stage over the link to the host, one way; nothing else is done meanwhile."""
    if job.layout.offload != "optimizer":
        return 0.0
    return job.host_bytes(stage) / job.cluster.device.host_link_bytes_per_s
