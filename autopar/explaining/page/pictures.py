"""Where things are drawn: numbers for the SVG in the template. Positions are percentages of a picture's width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autopar.layouts import KEYS as LAYOUT_KEYS

MOST_BARS = 12  # stages whose memory is drawn; the table has all
MOST_LINES = 32  # parts of a dim that are drawn one by one
ROOM = 1.12  # of a scale beyond its largest value
STRIP = 1000  # units across a strip of the time line
LEAST_WIDTH = 0.6  # units: what is shorter is still seen


@dataclass(frozen=True)
class Segment:
    """One colour of a bar."""

    key: str
    start: float
    width: float
    nbytes: float


@dataclass(frozen=True)
class Bar:
    """A stacked bar. total: bytes."""

    name: str
    segments: tuple[Segment, ...]
    total: float


@dataclass(frozen=True)
class MemoryPicture:
    """Stacked bars on one scale. limit: where the limit stands, None where it lies beyond the picture."""

    bars: tuple[Bar, ...]
    keys: tuple[str, ...]
    limit: float | None
    left_out: int


def memory_picture(rows: Sequence[Mapping[str, Any]], limit_bytes: float) -> MemoryPicture:
    """Of stages or devices: {"name", "bytes": {category: bytes}}."""
    totals = [sum(row["bytes"].values()) for row in rows]
    most = max(totals, default=0) or 1
    scale = max(limit_bytes, most) * ROOM if most > limit_bytes / 8 else most * ROOM
    shown = _spread(len(rows), totals.index(max(totals)) if totals else 0)
    keys = tuple(in_order({key: 0 for row in rows for key, nbytes in row["bytes"].items() if nbytes}))
    bars = tuple(_bar(rows[at], scale) for at in shown)
    limit = 100 * limit_bytes / scale if limit_bytes <= scale else None
    return MemoryPicture(bars, keys, limit, len(rows) - len(shown))


def _bar(row: Mapping[str, Any], scale: float) -> Bar:
    at, segments = 0.0, []
    for key, nbytes in in_order(row["bytes"]).items():
        if nbytes:
            width = 100 * nbytes / scale
            segments.append(Segment(key, at, width, nbytes))
            at += width
    return Bar(row["name"], tuple(segments), sum(row["bytes"].values()))


def _spread(count: int, must: int) -> list[int]:
    """At most MOST_BARS places out of `count`, evenly, the first, the last and `must` among them."""
    if count <= MOST_BARS:
        return list(range(count))
    even = {round(i * (count - 1) / (MOST_BARS - 2)) for i in range(MOST_BARS - 1)}
    return sorted(even | {must})


@dataclass(frozen=True)
class Course:
    """Memory of one stage along the step. paths: (kind, path) of areas on top of each other, in a square of STRIP.

    peak_bytes, peak_s: how high it gets, and when first. held: bytes there, by kind. limit: where it stands.
    """

    name: str
    paths: tuple[tuple[str, str], ...]
    peak_bytes: int
    peak_s: float
    held: tuple[tuple[str, float], ...]
    limit: float | None


def courses(line: Mapping[str, Any], limit_bytes: float) -> tuple[Course, ...]:
    """The tracks of a `memory_line`, on one scale."""
    most = max((track["peak_bytes"] for track in line["tracks"]), default=0) or 1
    scale = max(limit_bytes, most) * ROOM if most > limit_bytes / 8 else most * ROOM
    limit = STRIP * (1 - limit_bytes / scale) if limit_bytes <= scale else None
    return tuple(_course(line, track, scale, limit) for track in line["tracks"])


def _course(line: Mapping[str, Any], track: Mapping[str, Any], scale: float, limit: float | None) -> Course:
    length, points = line["length_s"] or 1.0, track["points"]
    ends = [*(point[0] for point in points[1:]), length]
    below, paths = [0.0] * len(points), []
    for place, kind in enumerate(line["kinds"], 1):
        above = [low + point[place] for low, point in zip(below, points, strict=True)]
        if above != below:
            edge = "".join(
                f"H{STRIP * point[0] / length:.2f}V{STRIP * (1 - high / scale):.2f}H{STRIP * end / length:.2f}"
                for point, high, end in zip(points, above, ends, strict=True)
            )
            back = "".join(
                f"V{STRIP * (1 - low / scale):.2f}H{STRIP * point[0] / length:.2f}"
                for point, low in reversed(list(zip(points, below, strict=True)))
            )
            paths.append((kind, f"M0 {STRIP * (1 - below[0] / scale):.2f}{edge}{back}Z"))
        below = above
    highest = max(points, key=lambda point: sum(point[1:]))
    held = tuple(zip(line["kinds"], highest[1:], strict=True))
    return Course(track["name"], tuple(paths), track["peak_bytes"], track["peak_s"], held, limit)


# -- the time line ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """One track: (kind, path) to draw. share: of the step in which something runs on it."""

    track: str
    number: int
    paths: tuple[tuple[str, str], ...]
    share: float


def strips(line: Mapping[str, Any]) -> tuple[Strip, ...]:
    """The tracks of a time line, as `TimeLine.to_dict` gives it, over the whole step."""
    return tuple(_strip(line, number, track) for number, track in enumerate(line["tracks"]))


def _strip(line: Mapping[str, Any], number: int, track: str) -> Strip:
    length = line["length_s"] or 1.0
    by_kind: dict[str, list[str]] = {}
    for at, kind, _, start, end in line["spans"]:
        if at == number:
            left, width = STRIP * start / length, max(LEAST_WIDTH, STRIP * (end - start) / length)
            by_kind.setdefault(line["kinds"][kind], []).append(f"M{left:.2f} 0h{width:.2f}v1h-{width:.2f}z")
    busy = sum(seconds for name, _, seconds in line["totals"] if name == track)
    return Strip(track, number, tuple((k, "".join(d)) for k, d in by_kind.items()), busy / length)


# -- shardings ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A rectangle with cuts at these places, and the shares of its first part, which is what rank 0 holds."""

    rows: tuple[float, ...]
    columns: tuple[float, ...]
    row_share: float
    column_share: float


def cut_picture(parts: Sequence[int]) -> Cut:
    """Of a tensor whose dims are in so many parts. Drawn are the two dims that are cut most; a vector is a row."""
    if len(parts) > 1:
        row, column = sorted(sorted(range(len(parts)), key=lambda dim: -parts[dim])[:2])
        rows, columns = parts[row], parts[column]
    else:
        rows, columns = 1, parts[0] if parts else 1
    return Cut(_lines(rows), _lines(columns), 100 / rows, 100 / columns)


def _lines(parts: int) -> tuple[float, ...]:
    """Where the cuts are."""
    drawn = min(parts, MOST_LINES)
    return tuple(100 * i / drawn for i in range(1, drawn))


# -- an interval ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A predicted figure between two others."""

    low: float
    value: float
    high: float


def interval_picture(low: float, value: float, high: float) -> Interval:
    """On a scale that begins at zero."""
    scale = max(high, value) * ROOM or 1.0
    return Interval(100 * low / scale, 100 * value / scale, 100 * high / scale)


# The order in which people expect keys; a plan file has them by the alphabet.
ORDER = (
    *(
        "forward_s",
        "backward_s",
        "recompute_s",
        "offload_s",
        "communication_s",
        "tensor_messages_s",
        "expert_messages_s",
        "gathers_s",
        "bubble_s",
    ),
    *("send_s", "gradients_s", "optimizer_s", "parameters", "gradients", "optimizer", "activations", "temporaries"),
    *("buffers", "inputs", "allocator"),
    *LAYOUT_KEYS,
)


def in_order(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same, in the usual order; unknown keys come last."""
    places = {key: place for place, key in enumerate(ORDER)}
    return dict(sorted(values.items(), key=lambda item: places.get(item[0], len(places))))


def different(layout: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a layout that are not as in the chosen one."""
    return {key: value for key, value in in_order(layout).items() if value != chosen.get(key)}


def largest(values: Iterable[float]) -> float:
    """The largest size among numbers; 1 of nothing, so that it can divide."""
    return max((abs(v) for v in values), default=0.0) or 1.0
