"""Most choices of most ops can be left aside, and this finds out which.

The LP of a large problem is slow, while two neighbours of it are fast: the same LP with few
choices, and the dual ascent over all choices at a price on every byte at every time
(`solver.ascent`). So they take turns (Dantzig-Wolfe, with choices as columns): the first
says what memory is worth at each time, the second which choices are worth having at these
prices. By Lagrangian duality the second is also a lower bound on any solution within the
limit, and its margins tell which choices none better than a known one can use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from autopar.solver.ascent import Ascent, DualAscent
from autopar.solver.clock import Clock
from autopar.solver.lifetimes import Kinds, ValueLife
from autopar.solver.linear import Floats, Ints
from autopar.solver.problem import Problem, Solution
from autopar.solver.stage import COST_UNITS, Relaxation, Stage

Made = TypeVar("Made")
Allowed = list[npt.NDArray[np.bool_]]  # per op, which choices; the same for tied ops

NEAR = 1e-3  # of the bound: choices with a margin below this come in
MOST_NEAR = 3  # per op and round
CLOSE = 0.2  # of the gap that is to be proven: the two bounds agree
MOST_ROUNDS = 12
TURN_SWEEPS, MOST_SWEEPS = 12, 40  # of an ascent in the turns, and of one that is to prove all it can
MOST_MEMORY_COSTS = 3.0  # of the bound: what all memory together can sensibly be worth
ZERO = 1e-6  # no excess, model units


@dataclass(frozen=True)
class Restricted:
    """A problem with fewer choices. picks: per op, the original index of each choice that is left."""

    problem: Problem
    picks: list[Ints]

    def original(self, solution: Solution) -> Solution:
        return replace(solution, choices=tuple(int(p[c]) for p, c in zip(self.picks, solution.choices, strict=True)))


def shared(function: Callable[..., Made], *lists: Sequence[object]) -> list[Made]:
    """`function` of one element of each list, op by op; called once for ops that share these very objects, as
    identical layers do, and these go on sharing what it makes."""
    known: dict[tuple[int, ...], Made] = {}
    made = []
    for some in zip(*lists, strict=True):
        key = tuple(map(id, some))
        if key not in known:
            known[key] = function(*some)
        made.append(known[key])
    return made


def both(one: Allowed, other: Allowed) -> Allowed:
    """What is in one or the other."""
    return shared(np.logical_or, one, other)


def restrict(problem: Problem, allowed: Allowed) -> Restricted:
    picks: list[Ints] = shared(lambda some: np.nonzero(some)[0], allowed)
    choices = shared(lambda of, pick: tuple(of[c] for c in pick), [op.choices for op in problem.ops], picks)
    ops = tuple(replace(op, choices=some) for op, some in zip(problem.ops, choices, strict=True))
    return Restricted(replace(problem, ops=ops), picks)


def nearest(ascent: Ascent) -> Allowed:
    """Per op, its choices of least margin."""

    def of(margins: Floats) -> npt.NDArray[np.bool_]:
        near = np.zeros(len(margins), dtype=bool)
        near[np.argsort(margins, kind="stable")[:MOST_NEAR]] = True
        return near & (margins <= max(NEAR * max(ascent.bound, 1.0), margins.min()))

    return shared(of, ascent.margins)


def within(ascent: Ascent, slack: float) -> Allowed:
    """Per op, the choices that a solution cheaper than the bound + slack can take."""
    return shared(lambda margins: margins <= slack + 1e-6, ascent.margins)


@dataclass(frozen=True)
class Narrowed:
    """Where the turns ended.

    bound: proven, model units. priced: the ascent over all choices with that bound (None where all choices
    came in at once, or the clock ran out). stage / relaxed: the limited LP over the choices of `restricted`.
    paid: what it says a byte costs, from time 0 up to t.
    """

    restricted: Restricted
    stage: Stage
    relaxed: Relaxation
    priced: Ascent | None
    bound: float
    paid: Floats | None = None


class Narrowing:
    """The turns of LP and ascent. excess: for the least bytes beyond the limit, instead of the least cost.

    limit_bytes: None where memory is free. groups: conversions to start with; those that turn out to matter are
    added to the set. whole: for problems so small that all choices may come in at once, and no turns are taken.
    gap: what is to be proven, relative. graph: the ascent's, and kinds of values,
    stated once per problem.
    """

    def __init__(
        self,
        problem: Problem,
        lives: tuple[ValueLife, ...],
        clock: Clock,
        cost_scale: float,
        limit_bytes: int | None,
        byte_reference: float,
        *,
        excess: bool,
        groups: set[tuple[int, int, int]],
        whole: bool,
        gap: float,
        graph: Callable[[], DualAscent],
        kinds: Kinds,
    ) -> None:
        self.problem, self.lives, self.clock, self.cost_scale = problem, lives, clock, cost_scale
        self.limit_bytes, self.byte_reference, self.excess = limit_bytes, byte_reference, excess
        self.groups, self.whole, self.close = groups, whole, CLOSE * gap
        self._graph, self._kinds = graph, kinds

    def run(self, allowed: Allowed, *, enough: float = np.inf, seen: Ascent | None = None) -> Narrowed:
        """Take turns from these choices (which are extended in place) until LP and ascent agree, time is out, or
        the bound reaches `enough`. seen: an ascent at other prices, whose bound may do."""
        last: Narrowed | None = None
        bound, best = 0.0 if seen is None else max(0.0, seen.bound), seen
        for turn in range(MOST_ROUNDS):
            now = self.limited(allowed)
            if now.relaxed.status != "optimal" or now.relaxed.result is None:
                return replace(now if last is None else last, priced=best, bound=bound)
            last = now
            if self.whole or (self._stop_at_zero and now.relaxed.result.objective <= ZERO):
                return replace(now, bound=max(0.0, now.relaxed.bound) if self.whole else 0.0)
            if best is not None and self._agree(now, bound):  # after the LP: no better prices are needed
                break
            priced = self.ascend(self._sensible(now, bound), enough)
            if priced.bound > bound or best is None:
                bound, best = max(bound, priced.bound), priced
            if self._agree(now, bound) or bound >= enough or self.clock.out() or turn == MOST_ROUNDS - 1:
                break
            fresh = both(nearest(priced), allowed)
            if all((a == b).all() for a, b in zip(fresh, allowed, strict=True)):
                break
            allowed[:] = fresh
        return replace(now, priced=best, bound=bound)

    def _agree(self, now: Narrowed, bound: float) -> bool:
        return now.relaxed.bound - bound <= self.close * max(now.relaxed.bound, 1.0)

    def _sensible(self, now: Narrowed, bound: float) -> Floats:
        """The LP's prices of memory. If its few choices do not fit, these are penalties, and are scaled down."""
        assert now.paid is not None
        most = MOST_MEMORY_COSTS * max(bound, COST_UNITS)
        credit = float(now.paid[-1]) * now.stage.model.limit
        return now.paid if self.excess or credit <= most else now.paid * (most / credit)

    def tightened(self, found: Narrowed, enough: float) -> Narrowed:
        """The same with a better bound, from a longer ascent at the prices where the turns ended."""
        if found.priced is None or found.paid is None:
            return found
        priced = self.ascend(self._sensible(found, found.bound), enough, MOST_SWEEPS)
        return replace(found, priced=priced, bound=priced.bound) if priced.bound > found.bound else found

    def ascend(self, paid: Floats, enough: float = np.inf, sweeps: int = TURN_SWEEPS) -> Ascent:
        """The bound over all choices at these memory prices."""
        scale = 0.0 if self.excess else self.cost_scale
        return self._graph().run(scale, paid, sweeps, limit_bytes=self.limit_bytes, enough=enough)

    def limited(self, allowed: Allowed) -> Narrowed:
        """The limited LP over these choices; nothing is proven yet for the others."""
        restricted = restrict(self.problem, allowed)
        stage = self._stage(restricted.problem)
        stage.add_groups(sorted(self.groups))
        relaxed = stage.relax(stop_at_zero=self._stop_at_zero)
        if relaxed.status == "infeasible":  # not for want of memory, which is paid for: of conversions
            stage.add_all_groups()
            relaxed = stage.relax(stop_at_zero=self._stop_at_zero)
        self.groups.update(stage.groups())
        paid = None if relaxed.result is None else stage.prices(relaxed.result).paid
        return Narrowed(restricted, stage, relaxed, None, 0.0, paid)

    @property
    def _stop_at_zero(self) -> bool:
        return self.excess and bool(self.limit_bytes)

    def _stage(self, problem: Problem) -> Stage:
        return Stage(
            problem,
            self.lives,
            self.clock,
            self.cost_scale,
            limit_bytes=self.limit_bytes,
            byte_reference=self.byte_reference,
            excess=self.excess,
            kinds=self._kinds,
        )
