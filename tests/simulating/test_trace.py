"""The trace that a simulation writes: Chrome's trace event format, by its rules."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from autopar.errors import AutoparError
from autopar.simulating.costs import LANES, Reduction
from autopar.simulating.simulation import Simulation, simulate_cost
from tests.simulating.jobs import step


@pytest.fixture(scope="module")
def simulated() -> Simulation:
    cost = step("1f1b", [(1 / 3, 1 / 7, 1 / 11)] * 4, 8, send_s=1e-3 / 3, message_s=0.01 / 3, host_s=0.1)
    stages = [
        dataclasses.replace(s, reductions=(Reduction(0.1 / 3),), optimizer_s=0.05, states_bytes=3e9)
        for s in cost.stages
    ]
    return simulate_cost(dataclasses.replace(cost, stages=tuple(stages), ranks=2))


@pytest.fixture(scope="module")
def events(simulated: Simulation, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    simulated.save(path)
    read = json.loads(path.read_text())
    assert set(read) == {"displayTimeUnit", "traceEvents"}
    found: list[dict[str, Any]] = read["traceEvents"]
    return found


def test_every_event_has_what_its_kind_needs(events: list[dict[str, Any]]) -> None:
    needs = {"M": {"args"}, "X": {"ts", "dur", "cat"}, "C": {"ts", "args"}}
    for event in events:
        assert {"ph", "pid", "tid", "name"} | needs[event["ph"]] <= set(event)
        assert all(isinstance(event[key], int) for key in ("pid", "tid"))
        assert all(event[key] >= 0 for key in ("ts", "dur") if key in event)
        if event["ph"] == "C":
            assert all(isinstance(value, int) and value >= 0 for value in event["args"].values())


def test_a_process_a_stage_and_a_track_a_lane(events: list[dict[str, Any]], simulated: Simulation) -> None:
    named = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert named == {i: f"stage {i} (2 ranks alike)" for i in range(4)}
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(tracks.values()) <= set(LANES) and len(set(tracks.values())) == 5
    for event in events:
        if event["ph"] == "X":
            assert tracks[event["pid"], event["tid"]] == event["cat"]
    assert len(tracks) == len({(t.stage, t.lane) for t in simulated.tasks})


def test_events_of_a_track_do_not_overlap(events: list[dict[str, Any]], simulated: Simulation) -> None:
    """In whole nanoseconds, so that no viewer has to guess."""
    spans: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            start = round(event["ts"] * 1000)
            spans[event["pid"], event["tid"]].append((start, start + round(event["dur"] * 1000)))
    assert sum(map(len, spans.values())) == len(simulated.tasks)
    for track in spans.values():
        assert all(a[1] <= b[0] for a, b in pairwise(sorted(track)))
    last = max(end for track in spans.values() for _, end in track)
    assert last == pytest.approx(simulated.step_time_s * 1e9, abs=2)


def test_memory_is_a_counter_of_each_stage(events: list[dict[str, Any]], simulated: Simulation) -> None:
    for stage in range(4):
        points = [e for e in events if e["ph"] == "C" and e["pid"] == stage]
        times = [e["ts"] for e in points]
        assert times == sorted(set(times))
        highest = max(sum(e["args"].values()) for e in points)
        assert highest == simulated.memory[stage].peak.total == 3e9 + 4 - stage


def test_a_trace_that_cannot_be_written_is_one_error(simulated: Simulation, tmp_path: Path) -> None:
    with pytest.raises(AutoparError, match=r"cannot write trace .*nowhere.*: No such file or directory; nothing was"):
        simulated.save(tmp_path / "nowhere" / "trace.json")
