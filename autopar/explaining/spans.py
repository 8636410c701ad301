"""A time line: what runs when, on which track. Where it comes from (a plan, a simulation) does not matter here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

KINDS = ("forward", "backward", "recomputation", "communication", "optimizer", "launches")


@dataclass(frozen=True)
class Span:
    """One stretch of work. kind: one of KINDS. Spans of one track do not overlap."""

    track: str
    kind: str
    name: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class TimeLine:
    """One step. note: what the reader has to know of it. tracks: those that come first, in this order.

    totals: seconds by (track, kind), where spans are drawn coarser than they are; otherwise they say so themselves.
    """

    spans: tuple[Span, ...]
    note: str
    tracks: tuple[str, ...] = ()
    totals: Mapping[tuple[str, str], float] | None = None

    def seconds(self) -> dict[tuple[str, str], float]:
        """By (track, kind)."""
        if self.totals is not None:
            return dict(self.totals)
        found: dict[tuple[str, str], float] = {}
        for span in self.spans:
            found[span.track, span.kind] = found.get((span.track, span.kind), 0.0) + span.seconds
        return found

    @property
    def length_s(self) -> float:
        """From the beginning to the last end."""
        return max((span.end_s for span in self.spans), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """As data: `spans` has [track, kind, name, start, end] each, the first three as places in the lists."""
        used = dict.fromkeys(s.track for s in self.spans)
        tracks = _places((*(t for t in self.tracks if t in used), *used))
        kinds = _places(kind for kind in KINDS if any(s.kind == kind for s in self.spans))
        names = _places(s.name for s in self.spans)
        return {
            "length_s": self.length_s,
            "note": self.note,
            "tracks": list(tracks),
            "kinds": list(kinds),
            "names": list(names),
            "totals": [[track, kind, seconds] for (track, kind), seconds in self.seconds().items()],
            "spans": [[tracks[s.track], kinds[s.kind], names[s.name], s.start_s, s.end_s] for s in self.spans],
        }


def one_after_another(parts: Iterable[tuple[str, str, str, float]]) -> tuple[Span, ...]:
    """Spans of (track, kind, name, seconds) that do not overlap at all; neighbours that are alike become one."""
    return tuple(_joined(_in_turn(parts)))


def _in_turn(parts: Iterable[tuple[str, str, str, float]]) -> Iterator[Span]:
    now = 0.0
    for track, kind, name, seconds in parts:
        if seconds > 0:
            yield Span(track, kind, name, now, now + seconds)
            now += seconds


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    held: Span | None = None
    for span in spans:
        if held is not None and (held.track, held.kind, held.name) == (span.track, span.kind, span.name):
            held = replace(held, end_s=span.end_s)
            continue
        if held is not None:
            yield held
        held = span
    if held is not None:
        yield held


def _places(values: Iterable[str]) -> dict[str, int]:
    """Every value once, with its place in the order of first appearance."""
    return {value: place for place, value in enumerate(dict.fromkeys(values))}
