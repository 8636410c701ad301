"""Under a memory limit, most choices of most ops can be left aside, and this finds out which.

The LP of a large problem with memory rows is slow, while two neighbours of it are fast:
the same LP with few choices, and the LP of all choices without memory rows but with a
price on every byte at every time. So they take turns (Dantzig-Wolfe, with choices as
columns): the first says what memory is worth at each time, the second which choices are
worth having at these prices. By Lagrangian duality the second is also a lower bound on
any solution within the limit, and its reduced costs tell which choices none better than
a known one can use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from autopar.solver.lifetimes import ValueLife, lifetimes
from autopar.solver.linear import Ints
from autopar.solver.problem import Problem, Solution
from autopar.solver.stage import Clock, Relaxation, Stage

Allowed = list[npt.NDArray[np.bool_]]  # per op, which choices; the same for tied ops

NEAR = 1e-4  # of the bound: choices that lose less than this come in
MOST_NEAR = 6  # per op and round
USED = 1e-6  # an LP takes a choice
CLOSE = 2e-5  # of the bound: the two LPs agree
MOST_ROUNDS = 12
ZERO = 1e-6  # no excess, model units


@dataclass(frozen=True)
class Restricted:
    """A problem with fewer choices. picks: per op, the original index of each choice that is left."""

    problem: Problem
    lives: tuple[ValueLife, ...]
    picks: list[Ints]

    def original(self, solution: Solution) -> Solution:
        return replace(solution, choices=tuple(int(p[c]) for p, c in zip(self.picks, solution.choices, strict=True)))


def restrict(problem: Problem, allowed: Allowed) -> Restricted:
    picks = [np.nonzero(a)[0] for a in allowed]
    ops = tuple(
        replace(op, choices=tuple(op.choices[c] for c in pick)) for op, pick in zip(problem.ops, picks, strict=True)
    )
    smaller = replace(problem, ops=ops)
    return Restricted(smaller, lifetimes(smaller), picks)


def nearest(stage: Stage, relaxed: Relaxation) -> Allowed:
    """Per op, the choices that an LP takes, and those of least reduced cost."""
    assert relaxed.result is not None
    allowed = []
    for columns in stage.form.x:
        reduced = relaxed.result.reduced[columns]
        near = np.zeros(len(columns), dtype=bool)
        near[np.argsort(reduced, kind="stable")[:MOST_NEAR]] = True
        near &= reduced <= NEAR * max(relaxed.bound, 1.0)
        allowed.append(near | (relaxed.result.values[columns] > USED))
    return allowed


def within(stage: Stage, relaxed: Relaxation, slack: float) -> Allowed:
    """Per op, the choices that a solution cheaper than the LP's bound + slack can take."""
    assert relaxed.result is not None
    return [relaxed.result.reduced[columns] <= slack + 1e-6 for columns in stage.form.x]


@dataclass(frozen=True)
class Narrowed:
    """Where the turns ended.

    bound: proven, model units. priced: the priced LP over all choices, with that bound (None if
    the clock ran out). stage / relaxed: the limited LP over the choices of `restricted`.
    """

    restricted: Restricted
    stage: Stage
    relaxed: Relaxation
    priced: Relaxation | None
    bound: float


class Narrowing:
    """The turns of the two LPs. excess: for the least bytes beyond the limit, instead of the least cost.

    groups: conversions to start with; those that turn out to matter are added to the set.
    whole: for problems so small that all choices may come in at once, and no turns are taken.
    """

    def __init__(
        self,
        problem: Problem,
        lives: tuple[ValueLife, ...],
        clock: Clock,
        cost_scale: float,
        limit_bytes: int,
        byte_reference: float,
        *,
        excess: bool,
        groups: set[tuple[int, int, int]],
        whole: bool,
    ) -> None:
        self.problem, self.clock, self.cost_scale = problem, clock, cost_scale
        self.limit_bytes, self.byte_reference, self.excess = limit_bytes, byte_reference, excess
        self.groups = groups
        self.oracle: Stage | None = None
        if not whole:
            self.oracle = self._stage(problem, lives)
            self.oracle.add_groups(sorted(groups))

    def run(self, allowed: Allowed) -> Narrowed:
        """Take turns from these choices (which are extended in place) until the LPs agree or time is out."""
        bound, best = 0.0, None
        for turn in range(MOST_ROUNDS):
            now = self.limited(allowed)
            if now.relaxed.status != "optimal" or now.relaxed.result is None:
                return replace(now, priced=best, bound=bound)
            if self.oracle is None or (self._stop_at_zero and now.relaxed.result.objective <= ZERO):
                return replace(now, bound=max(0.0, now.relaxed.bound) if self.oracle is None else 0.0)
            priced = self._price_memory(self.oracle, now.stage, now.relaxed)
            if priced.bound > bound or best is None:
                bound, best = max(bound, priced.bound), priced
            agree = now.relaxed.bound - bound <= CLOSE * max(now.relaxed.bound, 1.0)
            if priced.result is None or agree or self.clock.out() or turn == MOST_ROUNDS - 1:
                break
            fresh = [a | b for a, b in zip(nearest(self.oracle, priced), allowed, strict=True)]
            if all((a == b).all() for a, b in zip(fresh, allowed, strict=True)):
                break
            allowed[:] = fresh
        return replace(now, priced=best if best is not None and best.result is not None else None, bound=bound)

    def limited(self, allowed: Allowed) -> Narrowed:
        """The limited LP over these choices; nothing is proven yet for the others."""
        restricted = restrict(self.problem, allowed)
        stage = self._stage(restricted.problem, restricted.lives)
        stage.add_groups(sorted(self.groups))
        relaxed = stage.relax(stop_at_zero=self._stop_at_zero)
        if relaxed.status == "infeasible" and self.excess:  # not for want of memory: of conversions
            stage.add_all_groups()
            relaxed = stage.relax(stop_at_zero=self._stop_at_zero)
        self.groups.update(stage.groups())
        return Narrowed(restricted, stage, relaxed, None, 0.0)

    @property
    def _stop_at_zero(self) -> bool:
        return self.excess and self.limit_bytes > 0

    def _stage(self, problem: Problem, lives: tuple[ValueLife, ...]) -> Stage:
        return Stage(
            problem,
            lives,
            self.clock,
            self.cost_scale,
            limit_bytes=self.limit_bytes,
            byte_reference=self.byte_reference,
            excess=self.excess,
        )

    def _price_memory(self, oracle: Stage, stage: Stage, relaxed: Relaxation) -> Relaxation:
        """The LP over all choices at the memory prices of a limited LP; its bound counts what the limit gives back."""
        assert relaxed.result is not None
        paid = stage.prices(relaxed.result).paid
        oracle.byte_prices = paid
        priced = oracle.relax()
        self.groups.update(oracle.groups())
        return replace(priced, bound=priced.bound - float(paid[-1]) * oracle.model.limit)
