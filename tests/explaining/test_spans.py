"""Time lines: of a plan every second exactly once, of a simulation what it says, drawn coarser where there is much."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from autopar.explaining import simulated
from autopar.explaining.simulated import simulated_line
from autopar.explaining.spans import KINDS, Span, TimeLine, one_after_another
from autopar.simulating.costs import COMPUTE
from autopar.simulating.simulation import Simulation, simulate_cost
from tests.simulating.jobs import step
from tests.test_planning import make

PINS: list[dict[str, Any] | None] = [None, {"dp": 2, "tp": 4, "zero": 3, "recompute": "full"}, {"dp": 8, "zero": 2}]


def test_neighbours_that_are_alike_become_one() -> None:
    parts = [
        ("a", "forward", "x", 1.0),
        ("a", "forward", "x", 2.0),
        ("b", "launches", "y", 0.0),
        ("a", "backward", "x", 1.0),
    ]
    assert one_after_another(parts) == (Span("a", "forward", "x", 0.0, 3.0), Span("a", "backward", "x", 3.0, 4.0))


def test_as_data_and_back() -> None:
    spans = one_after_another([("b", "launches", "n", 1.0), ("a", "forward", "m", 2.0)])
    line = TimeLine(spans, "note", ("a", "unused"))
    data = line.to_dict()
    assert data["tracks"] == ["a", "b"] and data["length_s"] == 3.0
    named = [(data["tracks"][t], data["kinds"][k], data["names"][n], a, b) for t, k, n, a, b in data["spans"]]
    assert named == [(s.track, s.kind, s.name, s.start_s, s.end_s) for s in line.spans]
    assert data["totals"] == [["b", "launches", 1.0], ["a", "forward", 2.0]]


@pytest.mark.parametrize("pin", PINS)
def test_a_step_has_every_op_and_every_transfer_once(pin: dict[str, Any] | None) -> None:
    plan = make("mlp", pin=pin, time_limit_s=5)
    line = plan.explain().time_line
    parts = plan.predicted["breakdown"]
    by_kind: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for (_, kind), seconds in line.seconds().items():
        by_kind[kind] += seconds
    assert line.length_s == pytest.approx(plan.objective_s, rel=1e-9)
    wanted = [parts[f"{k}_s"] for k in ("forward", "backward", "recompute", "communication", "optimizer")]
    assert list(by_kind.values()) == pytest.approx([*wanted, 0.0], rel=1e-9)
    assert all(a.end_s == b.start_s for a, b in itertools.pairwise(line.spans))
    order = [s.kind for s in line.spans if s.kind != "communication"]
    assert order.index("backward") > max(i for i, k in enumerate(order) if k == "forward")
    assert order[-1] == "optimizer"
    assert ("recomputation" in order) == (pin is not None and "recompute" in pin)


def pipeline(stages: int, micro_batches: int = 4) -> Simulation:
    return simulate_cost(step("1f1b", [(1.0, 1.0, 1.0)] * stages, micro_batches, send_s=0.1, message_s=0.2))


def test_a_simulation_is_drawn_as_it_is() -> None:
    made = pipeline(2)
    line = simulated_line(made)
    assert line.length_s == made.step_time_s and len(line.spans) == len(made.tasks)
    busy = line.seconds()["stage 1: compute", "backward"]
    assert busy == pytest.approx(sum(t.end_s - t.start_s for t in made.tasks if t[:2] == (1, COMPUTE)) * 2 / 3)
    assert line.to_dict()["tracks"][0] == "stage 0: compute"
    assert {s.kind for s in line.spans if "compute" not in s.track} == {"communication"}
    json.dumps(line.to_dict(), allow_nan=False)
    alone = simulated_line(pipeline(1))
    assert "compute" in alone.to_dict()["tracks"]


def test_of_many_stages_some_are_drawn_and_of_many_tasks_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pipeline(20)
    line = simulated_line(made)
    drawn = {s.track.split(":")[0] for s in line.spans}
    assert len(drawn) == simulated.MOST_STAGES and {"stage 0", "stage 19"} <= drawn
    assert "Drawn are stages 0, " in line.note
    exact = line.seconds()
    monkeypatch.setattr(simulated, "MOST_SPANS", 10)
    coarse = simulated_line(made)
    assert coarse.seconds() == exact and coarse.length_s == line.length_s and simulated.COARSE in coarse.note
    assert len(coarse.spans) <= len(line.spans)
    for track in drawn:
        spans = [s for s in coarse.spans if s.track.startswith(f"{track}: compute")]
        assert all(a.end_s <= b.start_s + 1e-12 for a, b in itertools.pairwise(spans))
