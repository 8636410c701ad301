"""How far predictions were from measured runs, by device: the error bar of a figure.

`measured_errors.json` is written by `benchmarks/calibrate.py` from the predictions of every published run in
`benchmarks/data`, as quantiles of measured over predicted. A device that no run was measured on has no error bar.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from autopar.cluster import ClusterSpec

SHARE = 0.8  # of the runs lie between the quantiles that make an interval
LOW, HIGH = "0.1", "0.9"


@dataclass(frozen=True)
class MeasuredErrors:
    """Of one device, on one node or on several. time, memory: quantiles of measured over predicted, by "0.1", "0.5" ...

    median_error: of the step time, relative. runs, memory_runs: how many there are. gpus: the fewest and the most.
    sources: (title, runs) of each.
    """

    device: str
    where: str
    runs: int
    memory_runs: int
    gpus: tuple[int, int]
    median_error: float
    time: dict[str, float]
    memory: dict[str, float]
    sources: tuple[tuple[str, int], ...]

    def interval(self, predicted: float, quantity: str = "time") -> tuple[float, float] | None:
        """Between which figures a measurement lies, going by SHARE of those runs; None where none measured this."""
        quantiles = self.time if quantity == "time" else self.memory
        return (predicted * quantiles[LOW], predicted * quantiles[HIGH]) if quantiles else None


def where(nodes: int) -> str:
    """Runs on one node and on several are far from predictions in different ways."""
    return "on one node" if nodes == 1 else "on several nodes"


@cache
def known() -> dict[tuple[str, str], MeasuredErrors]:
    """By name of the device and `where`."""
    data = json.loads(files("autopar.explaining").joinpath("measured_errors.json").read_text(encoding="utf-8"))
    return {
        (name, place): _read(name, place, one)
        for name, places in data["devices"].items()
        for place, one in places.items()
    }


def _read(device: str, place: str, data: dict[str, Any]) -> MeasuredErrors:
    sources = tuple((title, runs) for title, runs in data["sources"].items())
    gpus = (data["gpus"][0], data["gpus"][1])
    return MeasuredErrors(device, place, **{**data, "sources": sources, "gpus": gpus})


def error_bars(cluster: ClusterSpec, step_time_s: float, peak_bytes: float) -> dict[str, Any] | None:
    """The measured errors of such a cluster and the intervals they give, as data; None where nothing was measured."""
    errors = known().get((cluster.device.name, where(cluster.nodes)))
    if errors is None:
        return None
    return {
        "share": SHARE,
        "where": errors.where,
        "step_time_s": errors.interval(step_time_s),
        "peak_bytes": errors.interval(peak_bytes, "memory"),
        "median_error": errors.median_error,
        "runs": errors.runs,
        "memory_runs": errors.memory_runs,
        "gpus": list(errors.gpus),
        "sources": [{"title": title, "runs": runs} for title, runs in errors.sources],
    }
