"""A target for one model and global batch: how many steps, and what each of them may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.errors import AutoparError
from autopar.sizing.target import Target

COUNTED_STEPS = 1000  # that are costed where the target is a step's time


@dataclass(frozen=True)
class Goal:
    """steps: of the whole run, each of per_step tokens or samples (unit); COUNTED_STEPS where the target names no
    amount. longest_step_s, budget_usd: infinite where there is no such limit.
    """

    target: Target
    unit: str
    per_step: int
    steps: int
    longest_step_s: float
    budget_usd: float

    @staticmethod
    def of(target: Target, *, global_batch: int, tokens: int | None) -> Goal:
        """tokens: of one sequence; None for a model whose samples are not made of tokens."""
        if target.unit == "tokens" and tokens is None:
            raise AutoparError(f"target {target.text!r}: this model reads no tokens; say how many samples instead")
        unit = target.unit or ("tokens" if tokens else "samples")
        per_step = global_batch * (tokens if unit == "tokens" and tokens else 1)
        steps = COUNTED_STEPS if target.amount is None else math.ceil(target.amount / per_step)
        longest_s = target.step_s or (math.inf if target.duration_s is None else target.duration_s / steps)
        return Goal(target, unit, per_step, steps, longest_s, target.budget_usd or math.inf)

    @property
    def has_budget(self) -> bool:
        """Whether money is limited."""
        return math.isfinite(self.budget_usd)

    def usd(self, device_s: float, price_per_hour_usd: float | None) -> float | None:
        """Of all steps, from the device-seconds of one."""
        return None if price_per_hour_usd is None else self.steps * device_s * price_per_hour_usd / 3600

    def admits(self, step_time_s: float, usd: float | None) -> bool:
        """Whether a step's time and the cost of all steps are within the limits."""
        return step_time_s <= self.longest_step_s and (
            not self.has_budget or (usd is not None and usd <= self.budget_usd)
        )
