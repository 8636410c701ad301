"""The report of named layouts: its alternatives are what predicting them says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from autopar.explaining.neighbours import best_of_each_key, memory_worth, neighbour_line
from autopar.units import seconds_text
from tests.explaining.reports import predicted, predictor


def test_it_is_about_the_fastest_that_fits() -> None:
    made = predicted()
    assert made.best.step_time_s == min(p.step_time_s for p in made.predictions)
    none = [replace(p, fits=False) for p in made.predictions]
    assert replace(made, predictions=none).best.peak_bytes == min(p.peak_bytes for p in none)
    data = made.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False))["step_time_s"] == made.best.step_time_s
    assert len(data["others"]) == len(made.predictions) - 1
    assert seconds_text(made.best.step_time_s) in data["headline"]


def test_neighbours_differ_in_one_key_and_are_priced_like_any_layout() -> None:
    made = predicted()
    chosen = made.best.layout
    follow = {
        "tp": {"dp", "sp"},
        "pp": {"dp", "schedule", "vpp"},
        "cp": {"dp"},
        "vpp": {"schedule"},
        "schedule": {"vpp"},
    }
    possible = [n for n in made.neighbours if n.prediction is not None]
    assert len({n.key for n in possible}) >= 5
    for one in possible:
        assert one.prediction is not None
        layout = one.prediction.layout
        changed = {k for k, v in layout.to_dict().items() if v != chosen.to_dict()[k]}
        assert one.key in changed and changed - {one.key} <= follow.get(one.key, set())
        assert layout.devices == chosen.devices
        assert one.prediction.step_time_s == predictor().predict(layout).step_time_s
        assert one.extra_s == one.prediction.step_time_s - made.best.step_time_s
    assert all(n.reason for n in made.neighbours if n.prediction is None)


def test_of_each_key_the_best() -> None:
    found = predicted().neighbours
    best = best_of_each_key(found)
    assert sorted(n.key for n in best) == sorted({n.key for n in found})
    for one in best:
        fitting = [n.prediction.step_time_s for n in found if n.key == one.key and n.prediction and n.prediction.fits]
        if fitting:
            assert one.prediction is not None and one.prediction.step_time_s == min(fitting)
        assert len(neighbour_line(one)) <= 100


def test_memory_is_worth_what_a_faster_layout_lacks() -> None:
    best = replace(predicted().best, step_time_s=1.0, peak_bytes=8 * 2**30)
    faster = replace(best, step_time_s=0.9, peak_bytes=12 * 2**30, fits=False)
    one = replace(predicted().neighbours[0], key="recompute", instead="none", baseline=best, prediction=faster)
    found = memory_worth(best, [one], 10 * 2**30)
    assert found["binds"] and found["seconds_per_byte"] == pytest.approx(0.1 / 2**31)
    assert found["lines"] == [
        "memory binds: with 2.00 GiB more, recompute=none would fit and save 100.000 ms a step: 50 ms a GiB"
    ]
    free = memory_worth(best, [replace(one, prediction=replace(faster, fits=True))], 10 * 2**30)
    assert not free["binds"] and free["seconds_per_byte"] == 0.0 and "2.00 GiB are free" in free["lines"][0]
    short = memory_worth(best, [], 6 * 2**30)
    assert short["binds"] and "short of memory: 2.00 GiB over" in short["lines"][0]


def test_every_stage_has_its_memory() -> None:
    made = predicted()
    rows = made.to_dict()["memory_at_peak"]
    assert len(rows) == made.best.layout.pp
    assert max(sum(row["bytes"].values()) for row in rows) == pytest.approx(made.best.peak_bytes, abs=8)
