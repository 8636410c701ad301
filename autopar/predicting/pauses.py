"""Pauses in pipelines that span nodes: observed in published runs, by a rule, not explained."""

from __future__ import annotations

from autopar.predicting.job import Job

_WIDE = 2  # nodes that a tensor group spans at most without pauses
_OFTEN = 16  # micro-batches from which on DistributedDataParallel brings them


def pause_s(job: Job) -> float:
    """Seconds of `Run.pipeline_pause_s` in each send and each receive; 0 where no pauses are known.

    In the nanotron sweep on H100 (benchmarks/data/h100_sweep.json) some runs wait 0.2 to 0.35 s in each send and each
    receive of a pipeline, whatever the model, the micro-batch and the degrees: a timer, not a transfer. So do

    - all 30 in which a tensor group spans more than two nodes;
    - of those with ZeRO stage 0, which is DistributedDataParallel around the pipeline, all 15 of 16 micro-batches or
      more in which gradients are summed among more than two ranks or between nodes, and none of seven of fewer;
    - of the other 219 about one in fourteen, with nothing in common: these are not predicted.

    Fitted without any one model on any one number of nodes, the pause comes out as 0.263 to 0.271 s. That two ranks of
    one node bring none rests on four runs only: three without pauses and one with.
    """
    layout, per_node = job.layout, job.cluster.devices_per_node
    if layout.pp == 1 or job.cluster.nodes == 1:
        return 0.0
    wide = layout.tp > _WIDE * per_node
    replicas = job.data_axis
    summed = replicas.size > 2 or replicas.size * replicas.stride > per_node
    wrapped = layout.zero == 0 and replicas.size > 1 and summed and job.micro_batches >= _OFTEN
    return job.run.pipeline_pause_s if wide or wrapped else 0.0


def paused_s(job: Job) -> float:
    """Seconds of all pauses of a step: a stage between others receives and sends twice for each micro-batch, and the
    first one's way to the last stage and back has a pause in each hop."""
    layout = job.layout
    ops = 2 if layout.pp == 2 else 4
    return pause_s(job) * (job.micro_batches * layout.vpp * ops + 2 * (layout.pp - 1))
