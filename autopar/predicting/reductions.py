"""Seconds of gradients and parameters on their way between data-parallel ranks, as far as nothing hides them."""

from __future__ import annotations

import math

from autopar.cost.collectives import MeshAxis, collective_time_s
from autopar.predicting.job import Job, Replicas
from autopar.predicting.stages import Stage, StageWork


def messages(job: Job, kind: str, nbytes: float, size: float, axis: MeshAxis | None = None) -> tuple[int, float]:
    """(number of messages, seconds of each) of a collective over `nbytes` in pieces of about `size` bytes.

    axis: of the ranks that take part; all that share the weights if left out.
    """
    count = max(1, math.ceil(nbytes / size)) if size else 1
    return count, collective_time_s(kind, nbytes / count, axis or job.data_axis, job.cluster)


def _in_messages(job: Job, kind: str, nbytes: float, size: float, axis: MeshAxis | None = None) -> float:
    """Seconds of a collective over `nbytes` in messages of about `size` bytes: each goes around all ranks."""
    count, seconds = messages(job, kind, nbytes, size, axis)
    return count * seconds


def reduction(job: Job) -> str:
    """The collective that sums gradients, but for ZeRO stage 3."""
    return "all_reduce" if job.layout.zero == 0 or job.run.reduces_whole else "reduce_scatter"


def rounds(job: Job) -> int:
    """How often a step reduces its gradients.

    With ZeRO stage 2 no rank keeps whole sums: what a backward pass leaves is reduced at once. Interleaved stages run
    as many micro-batches through a chunk in a row as there are stages, and reduce once for them.
    """
    if job.layout.zero != 2:
        return 1
    return job.micro_batches // job.layout.pp if job.layout.vpp > 1 else job.micro_batches


def reduce_s(job: Job, stage: Stage, work: StageWork) -> float:
    """The reductions of all gradients, as far as nothing hides them, and the parameters' way back."""
    exchange_s = tied_s(job, stage)
    if job.data_axis.size == 1 or job.layout.zero == 3:
        return exchange_s
    seconds, bucket, times = 0.0, job.run.bucket_bytes, rounds(job)
    for one in job.held(stage):
        seconds += _in_messages(job, reduction(job), one.numbers * job.precision.gradient, bucket, one.axis)
    seconds *= times
    if job.run.overlap:  # beside the backward passes that come after what is reduced
        hidden = work.whole_backward.seconds * (job.micro_batches if job.layout.zero == 2 else 1)
        seconds = max(seconds - hidden, seconds / times * _first(stage))
    return seconds + sum(count * each_s for count, each_s in returned(job, stage, work)) + exchange_s


def _first(stage: Stage) -> float:
    """The share of a stage's messages that nothing can hide: those of its first, or last, block."""
    return 1 / max(1, stage.blocks + 1)


def returned(job: Job, stage: Stage, work: StageWork) -> tuple[tuple[int, float], ...]:
    """With ZeRO stage 1 and 2, the parameters' way from the ranks that updated them to the others.

    (number of messages, seconds of each) for those that the same ranks have, or one message of as long as is left where
    the next forward pass runs beside.
    """
    if job.data_axis.size == 1 or job.layout.zero not in (1, 2):
        return ()
    found = tuple(_sent_back(job, stage, one) for one in job.held(stage))
    if not job.run.gathers_ahead:
        return found
    whole_s = sum(count * seconds for count, seconds in found)
    return ((1, max(whole_s - work.forward.seconds, whole_s * _first(stage))),)


def _sent_back(job: Job, stage: Stage, of: Replicas) -> tuple[int, float]:
    nbytes = of.numbers * job.precision.parameter
    if not job.run.owners:
        return messages(job, "all_gather", nbytes, job.run.bucket_bytes, of.zero_axis)
    owners = min(of.zero_axis.size, job.tensors(stage))
    return owners, collective_time_s("broadcast", nbytes / owners, of.zero_axis, job.cluster)


def tied_s(job: Job, stage: Stage) -> float:
    """The first and the last stage exchange and add the gradients of what both use."""
    if job.layout.pp == 1 or not (stage.first or stage.last):
        return 0.0
    nbytes = float(job.table.after.tied @ job.weights) * job.precision.gradient
    return collective_time_s("permute", nbytes, job.pipeline_axis, job.cluster) if nbytes else 0.0


def zero3_s(job: Job, stage: Stage, work: StageWork) -> float:
    """Per micro-batch: to gather parameters twice and scatter gradients (FSDP)."""
    if job.layout.zero != 3 or job.data_axis.size == 1:
        return 0.0
    gather_s = scatter_s = 0.0
    blocks = max(1, stage.blocks)  # one message each (FSDP)
    for one in job.held(stage):
        gathered, scattered = one.numbers * job.precision.parameter, one.numbers * job.precision.gradient
        gather_s += _in_messages(job, "all_gather", gathered, gathered / blocks, one.axis)
        scatter_s += _in_messages(job, "reduce_scatter", scattered, scattered / blocks, one.axis)
    forward = max(gather_s - work.forward.seconds, gather_s * _first(stage))
    backward = max(gather_s + scatter_s - work.whole_backward.seconds, (gather_s + scatter_s) * _first(stage))
    return forward + backward
