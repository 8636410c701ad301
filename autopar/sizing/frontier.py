"""The fastest layout on every size of a cluster, searched only where an answer depends on it.

Idle devices are allowed, so more devices never take longer: between two sizes that are solved, no size is faster than
the larger one, and none costs less than the next size up for that long. What such a bound rules out is not searched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from autopar.choosing.search import LayoutSearch
from autopar.choosing.space import Space
from autopar.errors import Infeasible
from autopar.predicting.predict import Prediction, Predictor
from autopar.sizing.goal import Goal
from autopar.sizing.offer import Offer

TOLERANCE = 0.02  # relative: a size that is not known to be cheaper, or faster within a budget, by more is left alone
Progress = Callable[[str], None]


class OutOfTime(Exception):
    """The clock ran out before a size was solved."""


@dataclass(frozen=True)
class Clock:
    """Until when to search, by time.perf_counter."""

    until_s: float

    @property
    def left_s(self) -> float:
        """Seconds; 0 if there are none."""
        return max(0.0, self.until_s - time.perf_counter())


@dataclass(frozen=True)
class Solved:
    """The best layout of a size and the time that none is below; infinite and None where nothing fits."""

    bound_s: float
    best: Prediction | None

    @property
    def step_time_s(self) -> float:
        """Of the best; infinite where nothing fits."""
        return math.inf if self.best is None else self.best.step_time_s


@dataclass(frozen=True)
class Interval:
    """Sizes above index `low` and below index `high`, both solved.

    fastest_s: no step is faster. cheapest: no size costs less (device-seconds of a step).
    """

    low: int
    high: int
    fastest_s: float
    cheapest_device_s: float


class Frontier:
    """All that is known of one cluster, by the index of its sizes (`Offer.devices`)."""

    def __init__(self, predictor: Predictor, offer: Offer, goal: Goal, pin: dict[str, object], clock: Clock) -> None:
        self.predictor, self.offer, self.goal, self.pin, self.clock = predictor, offer, goal, pin, clock
        self.solved: dict[int, Solved] = {}
        self.refusal: Infeasible | None = None
        self.searches = 0
        self.hopeless = offer.index(max(0, _least_devices(predictor, offer, goal) - 1))  # index; -1 if none is

    def solve(self, index: int, progress: Progress | None = None) -> Solved:
        """The fastest layout of a size; raises OutOfTime, PinError, LayoutError."""
        if index in self.solved:
            return self.solved[index]
        part = self.predictor.on(self.offer.whole.part(self.offer.devices(index)))
        if progress is not None:
            progress(f"{self.offer.name}: {part.cluster.devices} GPUs, {self.searches} sizes searched")
        self.searches += 1
        try:
            found = LayoutSearch(part, Space.of(part, self.pin)).run(self.clock.left_s)
        except Infeasible as refusal:
            if self.clock.left_s == 0:
                raise OutOfTime from None
            self.refusal = refusal
            self.solved[index] = Solved(math.inf, None)
            return self.solved[index]
        self.solved[index] = Solved(found.bound_s, found.best)
        if found.devices < part.cluster.devices:  # so many do as well, and none of the sizes between does better
            self.solved.setdefault(self.offer.index(found.devices), Solved(found.bound_s, found.best))
        return self.solved[index]

    # -- what is known ----------------------------------------------------------------------

    def bests(self) -> list[Prediction]:
        """The layouts found, by their devices, each no slower than those with more."""
        found = {s.best.layout.devices: s.best for _, s in sorted(self.solved.items(), reverse=True) if s.best}
        return [found[devices] for devices in sorted(found)]

    def usd(self, device_s: float) -> float | None:
        """Of all steps, from the device-seconds of one."""
        return self.goal.usd(device_s, self.offer.price_per_hour_usd)

    def admits(self, best: Prediction) -> bool:
        """Whether a layout meets the goal."""
        return self.goal.admits(best.step_time_s, self.usd(device_s(best)))

    def meeting(self) -> list[Prediction]:
        """The layouts that meet the goal, by their devices."""
        return [best for best in self.bests() if self.admits(best)]

    def closest(self) -> Prediction | None:
        """What comes nearest to the goal: the cheapest that is fast enough, else the fastest; None if nothing fits."""
        fast = [best for best in self.bests() if best.step_time_s <= self.goal.longest_step_s]
        if fast:
            return min(fast, key=device_s)
        return min(self.bests(), key=lambda best: best.step_time_s, default=None)

    def open_intervals(self) -> list[Interval]:
        """Where a size that is not solved could meet the goal."""
        found = []
        for low, high in pairwise([self.hopeless, *sorted(i for i in self.solved if i > self.hopeless)]):
            below = self.solved[low].bound_s if low in self.solved else math.inf
            fastest_s = self.solved[high].bound_s
            first = self.offer.devices(low + 1)
            if high - low > 1 and fastest_s < math.inf and fastest_s < below:
                one = Interval(low, high, fastest_s, first * fastest_s)
                if self.goal.admits(fastest_s, self.usd(one.cheapest_device_s)):
                    found.append(one)
        return found

    def middle(self, interval: Interval) -> int:
        """The size to solve next: halfway by the logarithm of the devices."""
        low = self.offer.devices(interval.low) if interval.low >= 0 else 1
        devices = math.sqrt(low * self.offer.devices(interval.high))
        return min(max(self.offer.index(round(devices)), interval.low + 1), interval.high - 1)


def _least_devices(predictor: Predictor, offer: Offer, goal: Goal) -> int:
    """Fewer cannot meet the goal: each does at most its highest peak, and at most half of what counts as FLOPs (the
    masked half of attention) need not be done."""
    if math.isinf(goal.longest_step_s):
        return 1
    peak = max(rate for _, rate in offer.whole.device.peak_flops_per_s)
    least = predictor.table.flops * predictor.global_batch / 2 / peak / goal.longest_step_s
    return math.ceil(min(least, offer.whole.devices))


def device_s(best: Prediction) -> float:
    """Device-seconds of a step."""
    return best.layout.devices * best.step_time_s
