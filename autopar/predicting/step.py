"""Seconds of one training step of a layout, and what they are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.cluster import ClusterSpec
from autopar.cost.collectives import MeshAxis, collective_time_s
from autopar.layouts import Layout
from autopar.predicting.memory import Precision, local_numbers
from autopar.predicting.run import Run
from autopar.predicting.sizes import Shape
from autopar.predicting.stages import Stage, StageWork, stage_work
from autopar.predicting.table import ModelTable
from autopar.predicting.work import Pricer, Work

_BUCKET_BYTES = 100 << 20  # of gradients and of parameters that travel together


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

    @property
    def total_s(self) -> float:
        """All of it."""
        parts = (self.forward_s, self.backward_s, self.recompute_s, self.tensor_messages_s, self.bubble_s)
        return sum(parts) + self.send_s + self.gradients_s + self.gathers_s + self.optimizer_s


def step_time(
    table: ModelTable,
    stages: list[Stage],
    layout: Layout,
    cluster: ClusterSpec,
    pricer: Pricer,
    shape: Shape,
    micro_batches: int,
    precision: Precision,
    run: Run,
) -> StepTime:
    """Price one step."""
    works = [
        _with_accumulation(stage_work(table, s, layout, pricer, shape), table, s, cluster, shape, precision, run)
        for s in stages
    ]
    zero3_s = [_zero3_s(table, s, layout, cluster, shape, precision, w) for s, w in zip(stages, works, strict=True)]
    slow = max(range(len(works)), key=lambda i: _seconds(works[i]) + zero3_s[i])
    worst = works[slow]
    send_s = _send_s(table, layout, cluster, shape)
    bubble_s = _bubble_s(layout, works, slow, send_s)
    sends = 0.0 if layout.pp == 1 else 2 * micro_batches * layout.vpp * send_s
    reduce_s = max(
        _reduce_s(table, s, layout, cluster, shape, precision, w, run) for s, w in zip(stages, works, strict=True)
    )
    numbers = max(local_numbers(table, s, shape) for s in stages)
    messages = worst.forward.messages_s + worst.backward.messages_s + worst.again.messages_s
    return StepTime(
        forward_s=micro_batches * _own(worst.forward),
        backward_s=micro_batches * _own(worst.backward),
        recompute_s=micro_batches * _own(worst.again),
        tensor_messages_s=micro_batches * messages,
        bubble_s=bubble_s,
        send_s=sends,
        gradients_s=reduce_s,
        gathers_s=micro_batches * zero3_s[slow],
        optimizer_s=_optimizer_s(table, numbers, layout, cluster, precision),
        flops=micro_batches * (worst.forward.flops + worst.backward.flops),
        again_flops=micro_batches * worst.again.flops,
    )


def _own(work: Work) -> float:
    """Without the collectives."""
    return max(work.kernels_s, work.host_s - work.messages_s)


def _seconds(work: StageWork) -> float:
    return work.forward.seconds + work.whole_backward.seconds


def _with_accumulation(
    work: StageWork, table: ModelTable, stage: Stage, cluster: ClusterSpec, shape: Shape, precision: Precision, run: Run
) -> StageWork:
    """Each micro-batch's gradients are read and added to their sum, which is read and written."""
    if not run.accumulates_apart:
        return work
    nbytes = local_numbers(table, stage, shape) * (precision.parameter + 2 * precision.gradient)
    adding = Work(kernels_s=_streaming_s(nbytes, cluster))
    return StageWork(work.forward, work.backward + adding, work.again)


def _bubble_s(layout: Layout, works: list[StageWork], slow: int, send_s: float) -> float:
    """What a pipeline adds to the slowest stage's own work: one micro-batch through all the others, both ways.

    Interleaved stages make it 1/vpp of that (Narayanan et al. 2021); zero-bubble hides the weights' gradients, half
    of the backward pass, in it (Qi et al. 2023, ZB-H1).
    """
    if layout.pp == 1:
        return 0.0
    others = [w for i, w in enumerate(works) if i != slow]
    around = sum(_seconds(w) for w in others) / layout.vpp
    if layout.schedule == "zero-bubble":
        around = sum(w.forward.seconds + w.again.seconds for w in others)
    return around + 2 * (layout.pp - 1) * send_s


def _send_s(table: ModelTable, layout: Layout, cluster: ClusterSpec, shape: Shape) -> float:
    """One micro-batch's activations to the next stage."""
    if layout.pp == 1:
        return 0.0
    part = table.block or table.before
    stride = layout.tp * layout.cp * layout.dp
    nbytes = float(part.boundary @ shape.weights)
    if layout.tp == 1 or layout.sp:
        return collective_time_s("permute", nbytes, MeshAxis(layout.pp, stride), cluster)
    # each rank of a tensor group sends its part, which is gathered there (Narayanan et al. 2021, section 4.1)
    gather_s = collective_time_s("all_gather", nbytes, MeshAxis(layout.tp, 1), cluster)
    return gather_s + collective_time_s("permute", nbytes / layout.tp, MeshAxis(layout.pp, stride), cluster)


def _in_messages(kind: str, nbytes: float, size: float, axis: MeshAxis, cluster: ClusterSpec) -> float:
    """Seconds of a collective over `nbytes` in messages of about `size` bytes: each goes around all ranks."""
    count = max(1, math.ceil(nbytes / size)) if size else 1
    return count * collective_time_s(kind, nbytes / count, axis, cluster)


def _data_axis(layout: Layout) -> MeshAxis:
    return MeshAxis(layout.dp * layout.cp, layout.tp)


def _reduce_s(
    table: ModelTable,
    stage: Stage,
    layout: Layout,
    cluster: ClusterSpec,
    shape: Shape,
    precision: Precision,
    work: StageWork,
    run: Run,
) -> float:
    """Exposed seconds of the reduction of all gradients at the end of a step, and of the parameters' way back."""
    numbers = local_numbers(table, stage, shape)
    axis = _data_axis(layout)
    tied_s = 0.0
    if layout.pp > 1 and (stage.first or stage.last):
        tied = float(table.after.tied @ shape.weights) * precision.gradient
        ends = MeshAxis(layout.pp, layout.tp * layout.cp * layout.dp)
        tied_s = collective_time_s("permute", tied, ends, cluster) if tied else 0.0  # they exchange and add
    if axis.size == 1 or layout.zero == 3:
        return tied_s
    kind = "all_reduce" if layout.zero == 0 else "reduce_scatter"
    reduce_s = _in_messages(kind, numbers * precision.gradient, _BUCKET_BYTES, axis, cluster)
    if run.overlap:
        hidden = work.whole_backward.seconds
        reduce_s = max(reduce_s - hidden, reduce_s / max(1, stage.blocks + 1))
    gather_s = 0.0
    if layout.zero:
        gather_s = _in_messages("all_gather", numbers * precision.parameter, _BUCKET_BYTES, axis, cluster)
    return reduce_s + gather_s + tied_s


def _zero3_s(
    table: ModelTable,
    stage: Stage,
    layout: Layout,
    cluster: ClusterSpec,
    shape: Shape,
    precision: Precision,
    work: StageWork,
) -> float:
    """Exposed seconds per micro-batch of gathering parameters twice and scattering gradients (FSDP)."""
    axis = _data_axis(layout)
    if layout.zero != 3 or axis.size == 1:
        return 0.0
    numbers = local_numbers(table, stage, shape)
    blocks = max(1, stage.blocks)  # one message each (FSDP)
    gathered, scattered = numbers * precision.parameter, numbers * precision.gradient
    gather_s = _in_messages("all_gather", gathered, gathered / blocks, axis, cluster)
    scatter_s = _in_messages("reduce_scatter", scattered, scattered / blocks, axis, cluster)
    first = 1 / max(1, stage.blocks + 1)
    forward = max(gather_s - work.forward.seconds, gather_s * first)
    backward = max(gather_s + scatter_s - work.whole_backward.seconds, (gather_s + scatter_s) * first)
    return forward + backward


def _optimizer_s(
    table: ModelTable, numbers: float, layout: Layout, cluster: ClusterSpec, precision: Precision
) -> float:
    """Every pass of the optimizer over its share reads and writes memory, and nothing else counts.

    Gradients: read for their norm, read and written to clip them, read by the update; in float16 read and written once
    more to take the loss scale out. State: read and written. A master copy is read again to write the parameter.
    """
    own = numbers / (layout.dp * layout.cp if layout.zero else 1)
    gradient_passes = 4 + (2 if table.dtype == "float16" else 0)
    copied = 4 if table.itemsize < 4 else 0
    nbytes = own * (gradient_passes * precision.gradient + 2 * precision.state + copied + precision.parameter)
    return _streaming_s(nbytes, cluster)


def _streaming_s(nbytes: float, cluster: ClusterSpec) -> float:
    """Seconds to read and write that much memory."""
    return nbytes / (cluster.device.memory_bytes_per_s * cluster.device.memory_efficiency_fraction)
