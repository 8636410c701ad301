"""Memory along a simulated step: what the picture is drawn from."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.explaining.memory_line import MOST_POINTS, memory_line
from autopar.explaining.page.pictures import STRIP, courses
from autopar.simulating.engine import PassRun
from autopar.simulating.schedules import BACKWARD, FORWARD, Action
from autopar.simulating.simulate import simulate_layout
from autopar.simulating.simulation import Simulation
from autopar.simulating.timeline import MemoryPoint, MemoryTimeline
from tests.explaining.reports import predicted, predictor


def of_points(*points: MemoryPoint, length_s: float) -> Simulation:
    runs = (PassRun(Action(FORWARD, 0, 0), 0.0, 1.0), PassRun(Action(BACKWARD, 0, 0), 1.0, 2.0))
    return Simulation((), length_s, (runs,), (MemoryTimeline(points),), (0.0,))


def total(point: list[float]) -> float:
    return sum(point[1:])


def test_every_stage_and_its_peak() -> None:
    simulation = predicted().simulation
    line = memory_line(simulation)
    assert [t["name"] for t in line["tracks"]] == [f"stage {i}" for i in range(simulation.stages)]
    for track, timeline in zip(line["tracks"], simulation.memory, strict=True):
        assert track["peak_bytes"] == round(timeline.peak.total)
        assert max(map(total, track["points"])) == pytest.approx(timeline.peak.total, abs=2)
        assert track["points"][0][0] == 0 and track["points"][-1][0] <= line["length_s"]
    first, last = line["tracks"][0], line["tracks"][-1]
    assert max(p[2] for p in first["points"]) > max(p[2] for p in last["points"])  # 1F1B: more are in flight


def test_a_long_step_is_drawn_by_its_highest_points() -> None:
    layout = "dp=1,pp=2,tp=8,micro_batch=1"
    simulation = simulate_layout(predictor(), layout)
    many = tuple(
        point._replace(time_s=point.time_s + k * 1e-9) for k in range(20) for point in simulation.memory[0].points
    )
    long = of_points(*sorted(many), length_s=simulation.step_time_s)
    line = memory_line(long)
    points: list[list[float]] = line["tracks"][0]["points"]
    assert len(points) <= MOST_POINTS + 1 and "stretches" in line["note"]
    assert max(map(total, points)) == pytest.approx(long.memory[0].peak.total, abs=2)


def test_areas_on_one_scale() -> None:
    held = (MemoryPoint(0, 10, 0, 0), MemoryPoint(1, 10, 20, 5), MemoryPoint(2, 10, 20, 0), MemoryPoint(3, 10, 0, 0))
    (course,) = courses(memory_line(of_points(*held, length_s=4)), limit_bytes=40)
    assert [kind for kind, _ in course.paths] == ["states", "activations", "temporaries"]
    assert course.held == (("states", 10), ("activations", 20), ("temporaries", 5))
    assert (course.peak_bytes, course.peak_s) == (35, 1)
    assert course.limit is not None
    heights = {kind: _tops(path) for kind, path in course.paths}
    scale = (STRIP - course.limit) / 40
    assert heights["states"] == pytest.approx(STRIP - 10 * scale, abs=0.01)
    assert heights["activations"] == pytest.approx(STRIP - 30 * scale, abs=0.01)
    assert heights["temporaries"] == pytest.approx(STRIP - 35 * scale, abs=0.01)
    (beyond,) = courses(memory_line(of_points(*held, length_s=4)), limit_bytes=4000)
    assert beyond.limit is None


def _tops(path: str) -> Any:
    """The highest point of a path."""
    return min(float(part.partition("H")[0].partition("Z")[0]) for part in path.split("V")[1:])
