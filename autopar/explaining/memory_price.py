"""What one more byte is worth: the problem solved again under other memory limits, on the mesh of the plan.

The price is a finite difference between two plans that were both solved, not a dual value: plans change in steps,
and between two steps one more byte is worth nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from autopar.errors import Infeasible
from autopar.explaining.alternatives import TOLERANCE
from autopar.explaining.workbench import DEFAULT_AGAIN_S, Workbench
from autopar.plans import Plan
from autopar.units import bytes_text, seconds_text, signed_seconds

PLENTY = 1 << 60  # bytes that no plan needs
FIRST_STEP = 0.01  # of the limit
STEPS = 6  # each twice the one before: up to 63 % more


@dataclass(frozen=True)
class LimitPoint:
    """The best plan found under one limit. `limit_bytes` None: memory free. `step_time_s` None: nothing fits."""

    limit_bytes: int | None
    step_time_s: float | None
    peak_bytes: int | None
    proven: bool


@dataclass(frozen=True)
class MemoryPrice:
    """Whether memory binds, and what more of it would buy.

    free: memory free; more: the first limit tried at which the plan gets faster; less: FIRST_STEP below the limit.
    tried: every limit that was asked about, in order.
    """

    limit_bytes: int
    step_time_s: float
    peak_bytes: int
    tried: tuple[LimitPoint, ...]

    @property
    def free(self) -> LimitPoint | None:
        """The plan with memory free."""
        return next((p for p in self.tried if p.limit_bytes is None), None)

    @property
    def binds(self) -> bool | None:
        """Whether more memory makes the plan faster by more than the solver's tolerance; None if not solved."""
        return None if self.free is None else self._faster(self.free)

    @property
    def more(self) -> LimitPoint | None:
        """The smallest of the raised limits that buys time."""
        raised = [p for p in self.tried if p.limit_bytes is not None and p.limit_bytes > self.limit_bytes]
        return next((p for p in raised if self._faster(p)), None)

    @property
    def less(self) -> LimitPoint | None:
        """The lowered limit."""
        return next((p for p in self.tried if p.limit_bytes is not None and p.limit_bytes < self.limit_bytes), None)

    @property
    def seconds_per_byte(self) -> float | None:
        """Seconds of a step that one more byte saves, on average up to `more`; 0 where memory does not bind."""
        if self.binds is False:
            return 0.0
        if self.more is None or self.more.step_time_s is None or self.more.limit_bytes is None:
            return None
        return (self.step_time_s - self.more.step_time_s) / (self.more.limit_bytes - self.limit_bytes)

    def _faster(self, point: LimitPoint) -> bool:
        return point.step_time_s is not None and point.step_time_s < self.step_time_s * (1 - TOLERANCE)

    def to_dict(self) -> dict[str, Any]:
        """The answer as data."""
        return {
            "binds": self.binds,
            "seconds_per_byte": self.seconds_per_byte,
            "tried": [dict(p.__dict__) for p in self.tried],
            "lines": self.lines(),
        }

    def lines(self) -> list[str]:
        """The answer in words."""
        if self.free is None:
            return ["whether memory binds was not solved in the time"]
        assert self.free.step_time_s is not None
        if not self.binds:
            return [f"memory does not bind: with memory free the step takes {seconds_text(self.free.step_time_s)}"]
        lines = [f"memory binds: with memory free the step takes {seconds_text(self.free.step_time_s)}"]
        price = self.seconds_per_byte
        if self.more is None or price is None:
            raised = [p.limit_bytes for p in self.tried if p.limit_bytes and p.limit_bytes > self.limit_bytes]
            if raised:
                lines.append(f"  a limit of up to {bytes_text(max(raised))} buys nothing yet")
        else:
            assert self.more.limit_bytes is not None
            extra = self.more.limit_bytes - self.limit_bytes
            known = "" if self.more.proven else ", best found in the time"
            lines.append(
                f"  {bytes_text(extra)} more buy {seconds_text(price * extra)} a step: {price * 2**30 * 1e3:.3g} ms a "
                f"GiB (two plans compared{known})"
            )
        if self.less is not None:
            step = bytes_text(self.limit_bytes - (self.less.limit_bytes or 0))
            slower = (self.less.step_time_s or 0.0) - self.step_time_s
            text = "do not fit" if self.less.step_time_s is None else f"cost {signed_seconds(slower)}"
            lines.append(f"  {step} less {text}")
        return lines


def memory_price(bench: Workbench, plan: Plan, *, time_limit_s: float = DEFAULT_AGAIN_S) -> MemoryPrice:
    """Ask the limits in turn, as far as the time goes."""
    deadline = time.perf_counter() + time_limit_s
    made = MemoryPrice(plan.options.memory_limit_bytes, plan.objective_s, plan.predicted["peak_bytes"], ())
    for limit in _limits(made):
        left = deadline - time.perf_counter()
        if (
            left <= 0
            or made.binds is False
            or (limit is not None and made.more is not None and limit > made.limit_bytes)
        ):
            break
        made = replace(made, tried=(*made.tried, _point(bench, plan, limit, left / 2)))
    return made


def _limits(made: MemoryPrice) -> Iterator[int | None]:
    """Memory free first, which settles most cases; then a step down, then steps up."""
    yield None
    yield int(made.limit_bytes * (1 - FIRST_STEP))
    for step in range(STEPS):
        yield int(made.limit_bytes * (1 + FIRST_STEP * 2**step))


def _point(bench: Workbench, plan: Plan, limit: int | None, time_limit_s: float) -> LimitPoint:
    options = replace(plan.options, memory_limit_bytes=PLENTY if limit is None else limit)
    try:
        found = bench.solve(options, time_limit_s=time_limit_s, fixed_mesh=plan.mesh)
    except Infeasible:
        return LimitPoint(limit, None, None, True)
    return LimitPoint(limit, found.objective_s, found.predicted["peak_bytes"], found.status == "optimal")
