"""`Fix`: one change after which a training step fits the memory, priced; and several of them in a line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autopar.units import bytes_text, seconds_text

MOST_NAMED = 5  # in one line
_BUYS, _BATCH = ("nodes", "memory_limit_bytes", "cluster"), ("global_batch", "seq")


@dataclass(frozen=True)
class Fix:
    """One change, the smallest of its kind that helps.

    what: for people. change: what becomes of which layout key, pin, or of nodes, devices_per_node, global_batch, seq,
        memory_limit_bytes (per device) or cluster (a preset); a pin that becomes None is left out.
    layout: in which the step then fits, in the keys of the command line. devices: that the cluster then has.
    step_time_s, peak_bytes: of that layout. slower: seconds per sample, relative to the layout that does not fit;
        None where none was named.
    """

    what: str
    change: Mapping[str, Any]
    layout: Mapping[str, Any]
    devices: int
    step_time_s: float
    peak_bytes: int
    slower: float | None = None

    @property
    def order(self) -> tuple[int, float, float]:
        """The cheapest first: other layouts, then another batch, then what has to be bought."""
        bought, batch = any(k in self.change for k in _BUYS), any(k in self.change for k in _BATCH)
        return 2 if bought else int(batch), self.step_time_s * (self.devices if bought else 1), self.peak_bytes

    def to_dict(self) -> dict[str, Any]:
        """As data."""
        return {**self.__dict__, "change": dict(self.change), "layout": dict(self.layout)}

    def __str__(self) -> str:
        if self.slower == 0.0:
            return self.what
        time = f"step {seconds_text(self.step_time_s)}" if self.slower is None else f"{self.slower:+.0%} time"
        return f"{self.what} ({time})"


def in_order(fixes: Iterable[Fix]) -> tuple[Fix, ...]:
    """The cheapest first."""
    return tuple(sorted(fixes, key=lambda fix: fix.order))


def any_one_of(fixes: tuple[Fix, ...]) -> str:
    """The cheapest few in one line, the cheapest of what has to be bought among them; "" if there are none."""
    if not fixes:
        return ""
    bought = [f for f in fixes if f.order[0] == 2][:2]
    free = [f for f in fixes if f.order[0] < 2][: MOST_NAMED - len(bought)]
    return "any one of: " + "; ".join(map(str, (*free, *bought)))


def lines(fixes: tuple[Fix, ...]) -> list[str]:
    """All of them, one a line, with the memory that they then take."""
    return [f"  {fix}, {bytes_text(fix.peak_bytes)}" for fix in fixes]
