"""Layouts that differ from a chosen one in one key, each priced by the same trace: why not a larger micro-batch?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autopar.errors import LayoutError
from autopar.explaining.text import fitted
from autopar.layouts import RECOMPUTE, SCHEDULES, Layout
from autopar.predicting.predict import Prediction, Predictor
from autopar.units import bytes_text, seconds_text, signed_bytes

_DEGREES = ("tp", "pp", "cp")  # dp makes up for them


@dataclass(frozen=True)
class Neighbour:
    """The chosen layout with `key` = `instead`. prediction: None where it cannot be, for `reason`."""

    key: str
    chosen: str
    instead: str
    baseline: Prediction
    prediction: Prediction | None
    reason: str = ""

    @property
    def extra_s(self) -> float | None:
        """Seconds a step that it takes more."""
        return None if self.prediction is None else self.prediction.step_time_s - self.baseline.step_time_s

    @property
    def extra_bytes(self) -> int | None:
        """Bytes at the peak that it takes more."""
        return None if self.prediction is None else self.prediction.peak_bytes - self.baseline.peak_bytes

    @property
    def outcome(self) -> str:
        """ "solved", "does not fit" or "impossible", as of other alternatives."""
        if self.prediction is None:
            return "impossible"
        return "solved" if self.prediction.fits else "does not fit"

    def to_dict(self) -> dict[str, Any]:
        """In the keys of `Alternative.to_dict`."""
        found = self.prediction
        return {
            "decision": self.key,
            "chosen": self.chosen,
            "condition": f"{self.key}={self.instead}",
            "instead": self.instead,
            "outcome": self.outcome,
            "reason": self.reason,
            "step_time_s": found.step_time_s if found else None,
            "peak_bytes": found.peak_bytes if found else None,
            "extra_s": self.extra_s,
            "extra_bytes": self.extra_bytes,
        }


def neighbours(predictor: Predictor, best: Prediction) -> Iterator[Neighbour]:
    """One key changed at a time; a degree of the model takes its devices from, or gives them to, data parallelism."""
    chosen = best.layout
    for key, value in _changes(chosen, predictor):
        before, after = str(getattr(chosen, key)).lower(), str(value).lower()
        try:
            prediction = predictor.predict(_changed(chosen, key, value))
        except LayoutError as error:
            yield Neighbour(key, before, after, best, None, str(error).removeprefix("layout: "))
        else:
            yield Neighbour(key, before, after, best, prediction)


def best_of_each_key(found: Sequence[Neighbour]) -> list[Neighbour]:
    """Per key the fastest that fits, else the leanest, else one that cannot be; the nearest to the chosen one first."""
    by_key: dict[str, list[Neighbour]] = {}
    for one in found:
        by_key.setdefault(one.key, []).append(one)
    best = [min(group, key=_rank) for group in by_key.values()]
    return sorted(best, key=_rank)


def neighbour_line(one: Neighbour) -> str:
    """One row of a text."""
    start = f"  {one.key:<12} {one.chosen:>10} -> {one.instead:<12}"
    if one.prediction is None:
        return fitted(f"{start} cannot be: {one.reason}")
    share = (one.extra_s or 0.0) / one.baseline.step_time_s
    time, memory = seconds_text(one.prediction.step_time_s), signed_bytes(one.extra_bytes or 0)
    return f"{start} {time:>11} {share:>+8.1%} {memory:>12}{'' if one.prediction.fits else '  does not fit'}"


def memory_worth(best: Prediction, found: Sequence[Neighbour], limit_bytes: float) -> dict[str, Any]:
    """Whether a layout one key away would be faster if more memory were there, and what a byte is then worth."""
    wanted = [n for n in found if n.prediction is not None and not n.prediction.fits and (n.extra_s or 0.0) < 0]
    if not wanted:
        left = limit_bytes - best.peak_bytes
        line = f"memory does not bind: {bytes_text(left)} are free, and no change of one key that needs more is faster"
        if left < 0:
            line = f"the layout is short of memory: {bytes_text(-left)} over the limit of {bytes_text(limit_bytes)}"
        return {"binds": left < 0, "seconds_per_byte": 0.0 if left >= 0 else None, "lines": [line]}
    rows = []
    for one in wanted:
        assert one.prediction is not None and one.extra_s is not None
        rows.append((-one.extra_s / (one.prediction.peak_bytes - limit_bytes), one))
    worth, one = max(rows, key=lambda row: row[0])
    assert one.prediction is not None and one.extra_s is not None
    short = one.prediction.peak_bytes - limit_bytes
    lines = [
        f"memory binds: with {bytes_text(short)} more, {one.key}={one.instead} would fit and save "
        f"{seconds_text(-one.extra_s)} a step: {worth * 2**30 * 1e3:.3g} ms a GiB"
    ]
    return {"binds": True, "seconds_per_byte": worth, "lines": lines}


def _rank(one: Neighbour) -> tuple[int, float]:
    if one.prediction is None:
        return 2, 0.0
    return (0, one.prediction.step_time_s) if one.prediction.fits else (1, float(one.prediction.peak_bytes))


def _changed(layout: Layout, key: str, value: Any) -> Layout:
    """The layout with one key changed; `dp` fills the devices."""
    if key == "vpp" and value > 1:
        return replace(layout, vpp=value, schedule="interleaved")
    if key in ("vpp", "schedule"):
        return replace(layout, **{"vpp": 1, "schedule": "1f1b", key: value})
    if key == "recompute":
        return replace(layout, recompute=value, recompute_blocks=None)
    if key not in _DEGREES:
        return replace(layout, **{key: value})
    now = layout.dp * getattr(layout, key)
    if now % value:
        raise LayoutError(f"layout: {key}={value} does not divide the {now} devices of dp and {key}")
    made = {**layout.to_dict(), key: value, "dp": now // value}
    if key == "pp" and (value == 1 or layout.pp == 1):
        made.update(vpp=1, schedule="none" if value == 1 else "1f1b")
    if key == "tp":
        made["sp"] = value > 1 and (layout.sp or layout.tp == 1)
    return Layout(**made)


def _changes(layout: Layout, predictor: Predictor) -> Iterator[tuple[str, Any]]:
    for key in (*_DEGREES, "micro_batch"):
        value = getattr(layout, key)
        for other in (value * 2, value // 2):
            if other >= 1 and not (key == "cp" and predictor.table.tokens <= 1):
                yield key, other
    for key, values in (("zero", range(4)), ("recompute", RECOMPUTE)):
        yield from ((key, other) for other in values if other != getattr(layout, key))
    if layout.tp > 1:
        yield "sp", not layout.sp
    if layout.pp > 1:
        others = (s for s in SCHEDULES if s not in ("none", "interleaved", layout.schedule))
        yield from (("schedule", other) for other in others)
        yield "vpp", layout.vpp * 2
        if layout.vpp > 1:
            yield "vpp", layout.vpp // 2
