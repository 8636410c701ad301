"""The usual layouts, priced by the same model: what a plan is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autopar.errors import Infeasible, PinError
from autopar.mesh_search import SearchSettings
from autopar.planning import search, usual_layouts
from autopar.trace import Trace


@dataclass(frozen=True)
class Baseline:
    """One usual layout: its pins, and its predicted time and memory, or the reason why it cannot be had."""

    name: str
    pin: Mapping[str, Any]
    step_time_s: float | None
    peak_bytes: int | None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The figures as a dict."""
        return {**self.__dict__, "pin": dict(self.pin)}


def baselines(trace: Trace, settings: SearchSettings) -> tuple[Baseline, ...]:
    """Plan the usual layouts for `trace` under the same limits; of several variants the fastest stands."""
    devices = settings.cluster.devices
    if devices == 1:
        return ()
    found = []
    for name, variants in usual_layouts(settings.cluster):
        tried = [_priced(trace, settings, name, pin) for pin in variants]
        if tried:
            found.append(min(tried, key=lambda b: float("inf") if b.step_time_s is None else b.step_time_s))
    return tuple(found)


def _priced(trace: Trace, settings: SearchSettings, name: str, pin: dict[str, Any]) -> Baseline:
    try:
        result = search(trace, replace(settings, pin=pin, progress=None, fixed_params=None, fixed_mesh=None))
    except (Infeasible, PinError) as error:
        if isinstance(error, Infeasible) and error.needed_bytes:
            return Baseline(name, pin, None, error.needed_bytes, f"does not fit: needs {error.needed_bytes} bytes")
        return Baseline(name, pin, None, None, str(error))
    best = result.best
    return Baseline(name, pin, best.price.step_time_s, best.memory.peak_bytes)
