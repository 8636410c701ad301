"""A sizing for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from autopar.layout_text import short
from autopar.units import bytes_text, seconds_text, span_text, usd_text

if TYPE_CHECKING:
    from autopar.sizing.types import ClusterSizing, Row, Sizing

SHOWN = 14  # rows of the table of time against cost


def describe(sizing: Sizing) -> str:
    """The target, the answers for each cluster, and time against cost."""
    lines = [*_target(sizing), "", *_answers(sizing), "", *_table(sizing), "", *notes(sizing, SHOWN)]
    return "\n".join(line.rstrip() for line in lines)


def summary(sizing: Sizing) -> str:
    """The target in figures."""
    goal = sizing.goal
    found = f"{goal.target}: {goal.steps:,} steps of {goal.per_step:,} {goal.unit}"
    if goal.target.amount is None:
        found = f"{goal.target}: {goal.per_step:,} {goal.unit} in a step; costs are those of {goal.steps:,} steps"
    if math.isfinite(goal.longest_step_s) and goal.target.step_s is None:
        rate = goal.per_step / goal.longest_step_s
        found += f", each in at most {seconds_text(goal.longest_step_s)} ({rate:,.0f} {goal.unit}/s)"
    return found


def _target(sizing: Sizing) -> list[str]:
    given = f"a global batch of {sizing.global_batch:,} samples, as given: it is a decision about training"
    return [f"target    {summary(sizing)}", f"batch     {given}"]


def _answers(sizing: Sizing) -> Iterator[str]:
    for one in sizing.clusters:
        yield f"{one.name:<12}{price_text(one)}"
        if not one.rows:
            yield f"  no size    {one.why}"
            continue
        for name, row in (("fewest", one.fewest), ("cheapest", one.cheapest), ("fastest", one.fastest)):
            assert row is not None
            yield f"  {name:<10} {row.gpus:>6,} GPUs  {run_text(row, sizing)}  {proof(one, name)}"


def price_text(one: ClusterSizing) -> str:
    """Of a device-hour."""
    if one.price_per_hour_usd is None:
        return "price not known; --price gives it one"
    return f"{one.price_per_hour_usd:.2f} USD per device-hour"


def run_text(row: Row, sizing: Sizing) -> str:
    """How long, and for how much."""
    hours = row.device_s * sizing.goal.steps / 3600
    cost = f"{hours:,.0f} device-hours" if row.usd is None else usd_text(row.usd)
    return f"{span_text(row.run_s)}, {cost}, step {seconds_text(row.step_time_s)}"


def proof(one: ClusterSizing, name: str) -> str:
    """How sure an answer is."""
    if name == "fewest":
        return "" if one.fewest_proven else "(not proven: the time was up)"
    if name == "cheapest":
        return f"(nothing is cheaper by more than {one.cheaper_by:.1%})" if one.cheaper_by else ""
    return ""


def shown(rows: Sequence[Row], most: int = SHOWN) -> list[Row]:
    """At most so many of the rows, both ends among them, evenly by the logarithm of the time."""
    if len(rows) <= most:
        return list(rows)
    left, right = math.log(rows[0].step_time_s), math.log(rows[-1].step_time_s)
    marks = [left + (right - left) * k / (most - 1) for k in range(most)]
    picked = {min(range(len(rows)), key=lambda i: abs(math.log(rows[i].step_time_s) - mark)) for mark in marks}
    return [rows[i] for i in sorted(picked)]


def _table(sizing: Sizing) -> Iterator[str]:
    per, rows = f"{sizing.goal.unit}/s", shown(sizing.pareto)
    figures = f"{'step':>10} {per:>12} {'time':>11} {'cost':>15} {'memory':>10} {'MFU':>6}"
    yield f"{'GPUs':>7} {'cluster':<12} {figures}  layout"
    for row in rows:
        yield (
            f"{row.gpus:>7,} {row.cluster:<12} {seconds_text(row.step_time_s):>10} {row.per_s:>12,.0f} "
            f"{span_text(row.run_s):>11} {'' if row.usd is None else usd_text(row.usd):>15} "
            f"{bytes_text(row.peak_bytes):>10} {row.mfu:>6.1%}  {short(row.layout)}"
        )


def notes(sizing: Sizing, most: int) -> list[str]:
    """What a table of at most so many rows leaves out, and what was searched."""
    rows, sizes = len(sizing.pareto), sum(one.searches for one in sizing.clusters)
    found = f"Time against cost: {min(most, rows)} of {rows} rows that nothing else beats in both."
    if not sizing.complete:
        found += " The time limit ended the search: a longer one may find more."
    return [found, f"{sizes} sizes of up to {sizing.max_gpus:,} GPUs searched in {sizing.solve_s:.1f} s."]
