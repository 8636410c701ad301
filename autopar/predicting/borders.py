"""What it takes to go between stages of different shape: activations and their gradients, converted."""

from __future__ import annotations

from itertools import pairwise

from autopar.cost.collectives import MeshAxis, collective_time_s
from autopar.layouts import Layout
from autopar.predicting.job import Job
from autopar.stage_shapes import common_mesh


def borders_s(layout: Layout, jobs: list[Job]) -> list[float]:
    """Seconds of one micro-batch at the borders between stages, both ways, by the pipeline rank before the border.

    jobs: of the pipeline ranks.
    On each axis of the mesh that stages share, a tensor is cut by samples (dp), by the sequence (cp, tp with sequence
    parallelism), or whole. What is whole is cut for nothing and gathered on the way back; other cuts are exchanged.
    """
    if layout.shapes is None:
        return []
    mesh, roles = common_mesh(layout.shapes)
    found = [0.0] * layout.pp
    for at, next_one in pairwise(stage % layout.pp for stage in range(layout.pp * layout.vpp)):
        found[at] += _border_s(mesh, roles[at], roles[next_one], jobs[at], jobs[next_one])
    return found


def _border_s(
    mesh: tuple[int, ...], before: tuple[str, ...], behind: tuple[str, ...], sender: Job, receiver: Job
) -> float:
    seconds, stride = 0.0, 1
    for size, one, other in reversed(list(zip(mesh, before, behind, strict=True))):
        cuts = {_cut(one, sender), _cut(other, receiver)}
        nbytes = max(float(job.table.boundary @ job.weights) for job in (sender, receiver))
        axis = MeshAxis(size, stride)
        if cuts == {"samples", "sequence"}:
            seconds += 2 * collective_time_s("all_to_all", nbytes, axis, sender.cluster)
        elif len(cuts) == 2:
            seconds += collective_time_s("all_gather", nbytes, axis, sender.cluster)
        stride *= size
    return seconds


def _cut(role: str, job: Job) -> str:
    if role == "tp":
        return "sequence" if job.layout.sp else "whole"
    return "samples" if role == "dp" else "sequence"
