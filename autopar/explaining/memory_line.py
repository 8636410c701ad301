"""Memory along a simulated step: what a device of a few pipeline stages holds, for a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from autopar.explaining.simulated import drawn_stages
from autopar.simulating.simulation import Simulation
from autopar.simulating.timeline import MemoryPoint, MemoryTimeline

KINDS = ("states", "activations", "temporaries")
MOST_POINTS = 600  # of a stage; of more, each of so many equal stretches is drawn as high as its highest point
NOTE = (
    "Simulated: states are parameters, gradients, the optimizer's and the allocator's; activations are there from a "
    "micro-batch's forward pass to the end of its backward pass, temporaries while a pass runs."
)
COARSE = f"Each of {MOST_POINTS} stretches of the step is drawn as high as its highest point."


def memory_line(simulation: Simulation) -> dict[str, Any]:
    """As data: `tracks` have `points` of [seconds, bytes of each kind], each of which holds until the next."""
    stages = drawn_stages(simulation.stages)
    notes, tracks = [NOTE], []
    if len(stages) < simulation.stages:
        notes.append(f"Drawn are stages {', '.join(map(str, stages))} of {simulation.stages}.")
    if any(len(simulation.memory[stage].points) > MOST_POINTS for stage in stages):
        notes.append(COARSE)
    for stage in stages:
        line = simulation.memory[stage]
        tracks.append({
            "name": "every device" if simulation.stages == 1 else f"stage {stage}",
            "peak_bytes": round(line.peak.total),
            "peak_s": line.peak.time_s,
            "points": [_rounded(point) for point in _points(line, simulation.step_time_s)],
        })  # fmt: skip
    return {"length_s": simulation.step_time_s, "kinds": list(KINDS), "note": " ".join(notes), "tracks": tracks}


def _rounded(point: MemoryPoint) -> list[float]:
    return [point.time_s, round(point.states), round(point.activations), round(point.temporaries)]


def _points(line: MemoryTimeline, length_s: float) -> Iterator[MemoryPoint]:
    """Those where something changes, the last of several at one time; or the highest of every stretch."""
    points = list({point.time_s: point for point in line.points}.values())
    if len(points) > MOST_POINTS:
        points = _highest(points, length_s)
    before: Sequence[float] | None = None
    for point in points:
        if point[1:] != before:
            before = point[1:]
            yield point


def _highest(points: list[MemoryPoint], length_s: float) -> list[MemoryPoint]:
    """What is held when a stretch begins counts in it, too."""
    found: list[MemoryPoint] = []
    at, held = 0, points[0]
    for stretch in range(MOST_POINTS):
        start_s, end_s = (length_s * place / MOST_POINTS for place in (stretch, stretch + 1))
        highest = held
        while at < len(points) and points[at].time_s < end_s:
            held = points[at]
            highest = max(highest, held, key=lambda point: point.total)
            at += 1
        found.append(highest._replace(time_s=start_s))
    return [*found, held._replace(time_s=length_s)]
