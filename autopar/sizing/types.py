"""What sizing finds, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from autopar.layouts import Layout
from autopar.sizing.goal import Goal

if TYPE_CHECKING:
    from os import PathLike


@dataclass(frozen=True)
class Row:
    """One layout on one size of one cluster.

    gpus: all of them work. per_s: tokens (or samples) in a second, on all. run_s, usd: of all steps of the goal; usd is
    None where the price of a device is not known. device_s: device-seconds of a step.
    """

    cluster: str
    gpus: int
    layout: Layout
    step_time_s: float
    per_s: float
    mfu: float
    peak_bytes: int
    run_s: float
    usd: float | None
    device_s: float

    def beats(self, other: Row) -> bool:
        """Whether it is no slower and no dearer, and one of them better. Without prices only within a cluster."""
        mine, its = self.usd, other.usd
        if mine is None or its is None:
            if self.cluster != other.cluster:
                return False
            mine, its = self.device_s, other.device_s
        better = self.step_time_s < other.step_time_s or mine < its
        return self.step_time_s <= other.step_time_s and mine <= its and better

    def to_dict(self) -> dict[str, Any]:
        """The layout in the keys of the command line."""
        return {**asdict(self), "layout": self.layout.to_dict()}


@dataclass(frozen=True)
class ClusterSizing:
    """The answers for one cluster.

    rows: what meets the goal, by GPUs. closest: what comes nearest where nothing does; None where nothing fits.
    why: what is missing then. fewest_proven: no smaller size does. cheaper_by: how much cheaper another size could be,
    at most, relative. searches: sizes that were searched, of so many.
    """

    name: str
    price_per_hour_usd: float | None
    rows: tuple[Row, ...]
    closest: Row | None
    why: str
    fewest_proven: bool
    cheaper_by: float
    searches: int
    sizes: int

    @property
    def fewest(self) -> Row | None:
        """With the fewest GPUs."""
        return min(self.rows, key=lambda row: row.gpus, default=None)

    @property
    def cheapest(self) -> Row | None:
        """With the fewest device-hours."""
        return min(self.rows, key=lambda row: row.device_s, default=None)

    @property
    def fastest(self) -> Row | None:
        """With the shortest step."""
        return min(self.rows, key=lambda row: row.step_time_s, default=None)

    def to_dict(self) -> dict[str, Any]:
        """As one JSON object."""
        answers = {"fewest": self.fewest, "cheapest": self.cheapest, "fastest": self.fastest, "closest": self.closest}
        return {
            "cluster": self.name,
            "price_per_hour_usd": self.price_per_hour_usd,
            "meets_target": bool(self.rows),
            "why_not": self.why or None,
            **{name: row.to_dict() if row else None for name, row in answers.items()},
            "fewest_proven": self.fewest_proven,
            "cheaper_by_at_most": self.cheaper_by,
            "sizes_searched": self.searches,
            "sizes": self.sizes,
        }


@dataclass(frozen=True)
class Sizing:
    """What a target takes. Print it, or take `to_dict()`, or write `to_html(path)`.

    pareto: rows of all clusters that meet the target and that no other beats, the slowest first.
    complete: whether the search ended before its time limit. trace_s, solve_s: of this process.
    """

    goal: Goal
    global_batch: int
    max_gpus: int
    clusters: tuple[ClusterSizing, ...]
    complete: bool
    trace_s: float
    solve_s: float

    @property
    def pareto(self) -> tuple[Row, ...]:
        """Time against cost: rows that no other row beats."""
        rows = sorted((row for one in self.clusters for row in one.rows), key=lambda row: -row.step_time_s)
        return tuple(row for row in rows if not any(other.beats(row) for other in rows))

    def to_dict(self) -> dict[str, Any]:
        """As one JSON object, with no infinity in it."""
        goal = self.goal
        return {
            "target": goal.target.text,
            "global_batch": self.global_batch,
            "unit": goal.unit,
            "per_step": goal.per_step,
            "steps": goal.steps,
            "longest_step_s": goal.longest_step_s if math.isfinite(goal.longest_step_s) else None,
            "budget_usd": goal.budget_usd if goal.has_budget else None,
            "max_gpus": self.max_gpus,
            "clusters": [one.to_dict() for one in self.clusters],
            "pareto": [row.to_dict() for row in self.pareto],
            "complete": self.complete,
            "trace_s": self.trace_s,
            "solve_s": self.solve_s,
        }

    def __str__(self) -> str:
        from autopar.sizing.text import describe

        return describe(self)

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the table and the picture as one HTML file that needs no network; raises AutoparError."""
        from autopar.sizing.page import write_page

        write_page(self, path)
