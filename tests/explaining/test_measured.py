"""Error bars: quantiles of measured over predicted, from rows as the benchmark writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autopar import ClusterSpec
from autopar.explaining.measured import SHARE, error_bars, known
from benchmarks import calibrate
from benchmarks.published_rows import sweep_cases, training_cases


def rows(slower: float) -> list[dict[str, Any]]:
    """Rows of published runs whose predictions are that much slower than what was measured."""
    cases = [*training_cases()[0], *(c for c in sweep_cases()[0] if c.ran)]
    made = [{"id": c.id, "source": c.source, "gpus": c.machine.gpus, "error": slower - 1} for c in cases]
    return [{**row, "peak_error": None if c.peak_bytes is None else 0.0} for row, c in zip(made, cases, strict=True)]


def test_quantiles_are_of_measured_over_predicted(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(rows(1.25)))
    assert calibrate.main([str(tmp_path / "rows.json"), "-o", str(tmp_path / "errors.json")]) == 0
    devices = json.loads((tmp_path / "errors.json").read_text())["devices"]
    assert {(name, place) for name, places in devices.items() for place in places} == set(known())
    for one in (one for places in devices.values() for one in places.values()):
        assert set(one["time"].values()) == {0.8} and one["median_error"] == 0.25
        assert set(one["memory"].values()) <= {1.0}
        assert sum(one["sources"].values()) == one["runs"] >= calibrate.LEAST_RUNS


def test_a_run_without_a_prediction_is_left_out() -> None:
    every = calibrate.errors_by_device(rows(1.0))
    without = calibrate.errors_by_device([{**row, "error": None} for row in rows(1.0)[:3]] + rows(1.0)[3:])
    assert runs(without) == runs(every) - 3


def runs(devices: dict[str, Any]) -> int:
    return sum(one["runs"] for places in devices.values() for one in places.values())


def test_the_file_is_of_these_runs() -> None:
    """Made by the present benchmark: the same runs of the same sources on the same devices."""
    now = calibrate.errors_by_device(rows(1.0))
    assert {n: (e.runs, dict(e.sources)) for n, e in known().items()} == {
        (n, p): (d["runs"], d["sources"]) for n, places in now.items() for p, d in places.items()
    }, "run benchmarks/calibrate.py again"


@pytest.mark.parametrize(("preset", "gpus"), [("h100-sxm", 8), ("h100-sxm", 64), ("a100-80g", 64)])
def test_an_interval_goes_with_the_figure(preset: str, gpus: int) -> None:
    cluster = ClusterSpec.preset(preset, gpus=gpus)
    one, two = error_bars(cluster, 1.0, 1e9), error_bars(cluster, 2.0, 1e9)
    assert one is not None and two is not None and one["share"] == SHARE
    low, high = one["step_time_s"]
    assert 0.5 < low < high and two["step_time_s"] == pytest.approx((2 * low, 2 * high))
    assert one["runs"] > 20 and one["sources"]


def test_a_device_without_runs_has_none() -> None:
    assert error_bars(ClusterSpec.preset("cpu", gpus=2), 1.0, 1e9) is None
