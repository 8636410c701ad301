"""The result of a simulated training step."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autopar.errors import AutoparError
from autopar.files import write_atomically
from autopar.simulating.chrome import chrome_trace
from autopar.simulating.costs import COMPUTE, StepCost
from autopar.simulating.engine import PassRun, Task, run_step
from autopar.simulating.schedules import Order
from autopar.simulating.timeline import MemoryTimeline, memory_timeline


@dataclass(frozen=True)
class Simulation:
    """One training step, stage by stage; all ranks of a pipeline stage are alike.

    tasks: by stage, in the order in which they were issued; those of one lane do not overlap.
    passes: of each stage, in order; a pass is the tasks of one micro-batch in one chunk, forward or backward.
    memory: along time, of one rank of each stage.
    idle_share: of the step, in which the device of a stage computes nothing.
    ranks: on each stage.
    """

    tasks: tuple[Task, ...]
    step_time_s: float
    passes: tuple[tuple[PassRun, ...], ...]
    memory: tuple[MemoryTimeline, ...]
    idle_share: tuple[float, ...]
    ranks: int = 1

    @property
    def stages(self) -> int:
        """How many pipeline stages there are."""
        return len(self.memory)

    @property
    def peak_bytes(self) -> int:
        """On the fullest rank."""
        return round(max(timeline.peak.total for timeline in self.memory))

    def to_dict(self) -> dict[str, Any]:
        """The figures, without tasks and time lines."""
        return {
            "step_time_s": self.step_time_s,
            "peak_bytes": self.peak_bytes,
            "peak_bytes_per_stage": [round(timeline.peak.total) for timeline in self.memory],
            "idle_share_per_stage": list(self.idle_share),
        }

    def chrome_trace(self) -> dict[str, Any]:
        """A trace to open at ui.perfetto.dev: a process a stage, a track a lane, memory as a counter."""
        return chrome_trace(self.tasks, self.memory, self.ranks)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to a file; either the whole file is written or the old one stays."""
        try:
            write_atomically(path, json.dumps(self.chrome_trace(), allow_nan=False, separators=(",", ":")))
        except OSError as error:
            raise AutoparError(f"cannot write trace {path}: {error.strerror or error}; nothing was changed") from error


def simulate_cost(cost: StepCost, orders: Sequence[Order] | None = None) -> Simulation:
    """Simulate a step from what its passes take. orders: see `run_step`."""
    stages = run_step(cost, orders)
    tasks = tuple(task for stage in stages for task in stage.tasks)
    step_s = max((task.end_s for task in tasks), default=0.0)
    busy = [sum(t.end_s - t.start_s for t in stage.tasks if t.lane == COMPUTE) for stage in stages]
    return Simulation(
        tasks,
        step_s,
        tuple(tuple(stage.passes) for stage in stages),
        tuple(memory_timeline(cost.stages[stage.at], stage.passes) for stage in stages),
        tuple(1 - one / step_s if step_s else 0.0 for one in busy),
        cost.ranks,
    )
