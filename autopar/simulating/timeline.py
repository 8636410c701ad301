"""Memory of each stage along time: states, what is kept for backward passes, and temporaries while a pass runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autopar.simulating.costs import StageCost
from autopar.simulating.engine import PassRun
from autopar.simulating.schedules import BACKWARD, FORWARD, WEIGHTS


class MemoryPoint(NamedTuple):
    """From this time on a rank holds so many bytes of each kind."""

    time_s: float
    states: float
    activations: float
    temporaries: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.states + self.activations + self.temporaries


@dataclass(frozen=True)
class MemoryTimeline:
    """Of one rank of a stage, by time; each point holds until the next."""

    points: tuple[MemoryPoint, ...]

    @property
    def peak(self) -> MemoryPoint:
        """The first of the highest points."""
        return max(self.points, key=lambda point: point.total)


def memory_timeline(cost: StageCost, passes: Sequence[PassRun]) -> MemoryTimeline:
    """What a stage holds: a micro-batch's activations from the start of its forward pass to the end of its last
    backward pass (that of the weights, where it is apart: it reads the inputs of all products)."""
    states, kept = cost.states_bytes, 0.0
    points = [MemoryPoint(0.0, states, 0.0, 0.0)]
    for action, start_s, end_s in passes:
        own = cost.chunks[action.chunk].kept_bytes
        if action.kind == FORWARD:
            kept += own
        points.append(MemoryPoint(start_s, states, kept, cost.temporaries_bytes))
        if action.kind in (BACKWARD, WEIGHTS):
            kept -= own
        points.append(MemoryPoint(end_s, states, kept, 0.0))
    return MemoryTimeline(tuple(points))


def in_flight_peak(passes: Sequence[PassRun], chunks: int) -> float:
    """The most micro-batches whose activations a stage holds at once, in units of the whole stage."""
    held = most = 0
    for action, _, _ in passes:
        held += action.kind == FORWARD
        most = max(most, held)
        held -= action.kind in (BACKWARD, WEIGHTS)
    return most / chunks
