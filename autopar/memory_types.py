"""What is known of a program's memory, as the planner and the report see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryEstimate:
    """The highest point of one rank's memory. `categories`: bytes there by kind; `phase` and `node`: where it is."""

    peak_bytes: int
    categories: dict[str, int]
    phase: str
    node: str
