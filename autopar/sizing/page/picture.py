"""Time against cost as points of a picture: where they and the marks of its axes lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.sizing.types import Row
from autopar.units import span_text, usd_text

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 380, 96, 48, 16, 24  # user units of the SVG
COLOURS = 8  # that the style sheet has


@dataclass(frozen=True)
class Mark:
    """A line of the grid, at x or y, with its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Point:
    """One row. title: what a pointer over it shows."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Curve:
    """The rows of one cluster. colour: the number of its class in the style sheet."""

    cluster: str
    colour: int
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        """Through its points."""
        return " ".join(f"{p.x:.1f},{p.y:.1f}" for p in self.points)


@dataclass(frozen=True)
class Picture:
    """Time from left to right, cost upwards, both logarithmic."""

    curves: tuple[Curve, ...]
    across: tuple[Mark, ...]
    up: tuple[Mark, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    base: int = HEIGHT - BOTTOM
    top: int = TOP
    right: int = WIDTH - RIGHT


@dataclass(frozen=True)
class _Axis:
    """From logarithms of values to user units."""

    low: float
    high: float
    start: float
    end: float

    @staticmethod
    def of(values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = math.log(min(values)), math.log(max(values))
        margin = max(0.05 * (high - low), 0.05)
        return _Axis(low - margin, high + margin, start, end)

    def at(self, value: float) -> float:
        return self.start + (math.log(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def marks(self, most: int = 7) -> list[float]:
        """Round values inside, at most so many."""
        for steps in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            decades = range(math.floor(self.low / math.log(10)), math.ceil(self.high / math.log(10)) + 1)
            found = [s * 10.0**d for d in decades for s in steps]
            found = [v for v in found if self.low <= math.log(v) <= self.high]
            if len(found) <= most:
                return found
        return found[:: math.ceil(len(found) / most)]


def picture_of(rows: Sequence[Row]) -> Picture | None:
    """Of the rows that have a price; None if there are none."""
    priced = [row for row in rows if row.usd]
    if not priced:
        return None
    across = _Axis.of([row.run_s for row in priced], LEFT, WIDTH - RIGHT)
    up = _Axis.of([row.usd or 0.0 for row in priced], HEIGHT - BOTTOM, TOP)
    names = list(dict.fromkeys(row.cluster for row in priced))
    curves = tuple(
        Curve(name, at % COLOURS, tuple(_point(row, across, up) for row in priced if row.cluster == name))
        for at, name in enumerate(names)
    )
    unit = _unit_s(priced)
    in_units = _Axis(across.low - math.log(unit), across.high - math.log(unit), across.start, across.end)
    return Picture(
        curves,
        tuple(Mark(in_units.at(v), span_text(v * unit)) for v in in_units.marks()),
        tuple(Mark(up.at(v), usd_text(v)) for v in up.marks()),
    )


def _unit_s(rows: Sequence[Row]) -> float:
    """A day, an hour or a second: that in which the longest time is written."""
    longest = max(row.run_s for row in rows)
    return next((unit for unit in (86400.0, 3600.0) if longest >= 2 * unit), 1.0)


def _point(row: Row, across: _Axis, up: _Axis) -> Point:
    usd = row.usd or 0.0
    return Point(
        across.at(row.run_s), up.at(usd), f"{row.gpus:,} {row.cluster}: {span_text(row.run_s)}, {usd_text(usd)}"
    )
