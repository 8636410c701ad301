"""A simulated step in Chrome's trace event format, which Perfetto reads, too.

Format: "Trace Event Format" (Google, 2016): `M` metadata, `X` complete events and `C` counters, `ts` and `dur` in
microseconds. One process a pipeline stage, one thread a lane that has something to do. Times are whole nanoseconds, so
that rounding makes no two events of a track overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from autopar.simulating.costs import LANES
from autopar.simulating.engine import Task
from autopar.simulating.timeline import MemoryTimeline

Event = dict[str, Any]

_THREAD = {lane: number for number, lane in enumerate(LANES, start=1)}


def chrome_trace(tasks: Sequence[Task], memory: Sequence[MemoryTimeline], ranks: int) -> dict[str, Any]:
    """The whole trace. ranks: on each stage."""
    events = [*_names(tasks, len(memory), ranks), *map(_complete, tasks)]
    for stage, timeline in enumerate(memory):
        events += _counters(stage, timeline)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _names(tasks: Sequence[Task], stages: int, ranks: int) -> Iterator[Event]:
    lanes = {(task.stage, task.lane) for task in tasks}
    alike = f" ({ranks} ranks alike)" if ranks > 1 else ""
    for stage in range(stages):
        yield _metadata(stage, 0, "process_name", name=f"stage {stage}{alike}")
        yield _metadata(stage, 0, "process_sort_index", sort_index=stage)
        for lane, thread in _THREAD.items():
            if (stage, lane) in lanes:
                yield _metadata(stage, thread, "thread_name", name=lane)
                yield _metadata(stage, thread, "thread_sort_index", sort_index=thread)


def _metadata(stage: int, thread: int, what: str, **args: object) -> Event:
    return {"ph": "M", "pid": stage, "tid": thread, "name": what, "args": args}


def _complete(task: Task) -> Event:
    start, end = _nanoseconds(task.start_s), _nanoseconds(task.end_s)
    event: Event = {
        "ph": "X",
        "pid": task.stage,
        "tid": _THREAD[task.lane],
        "name": task.name,
        "cat": task.lane,
        "ts": start / 1e3,
        "dur": (end - start) / 1e3,
    }
    if task.micro_batch >= 0:
        event["args"] = {"micro_batch": task.micro_batch, "chunk": task.chunk}
    return event


def _counters(stage: int, timeline: MemoryTimeline) -> Iterator[Event]:
    """Stacked in the order of the keys. Of several points at one time the last counts."""
    points = {_nanoseconds(point.time_s): point for point in timeline.points}
    for time, point in points.items():
        held = {"states": point.states, "activations": point.activations, "temporaries": point.temporaries}
        args = {name: round(nbytes) for name, nbytes in held.items()}
        yield {"ph": "C", "pid": stage, "tid": 0, "name": "memory (bytes)", "ts": time / 1e3, "args": args}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
