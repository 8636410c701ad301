"""The least memory that any solution needs, and what it would take for a problem to have one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from autopar.solver.evaluate import Evaluation, evaluate
from autopar.solver.narrow import Narrowed
from autopar.solver.problem import NO_ASSIGNMENT, InfeasibleProblem, Solution
from autopar.solver.stage import Clock, bytes_bound

if TYPE_CHECKING:
    from autopar.solver.search import Search

TINY = 200  # choices in all: below, the least memory is found exactly even where a rough figure would do
MODEST = 600  # choices in all: beyond, finding out what fits gets more time
EXPLAIN_S, EXPLAIN_LONGER_S = 4.0, 12.0  # for the capacity that an infeasible problem needs,
EXPLAIN_GAP = 1e-2  # to this precision
ROUGH_GAP = 0.05  # when there is no time left and nothing to show


def explain_s(search: Search) -> float:
    """Seconds that finding out what fits may take."""
    return EXPLAIN_S if search.size() <= MODEST else EXPLAIN_LONGER_S


def least_memory(search: Search, clock: Clock, gap: float) -> tuple[int, int, Solution]:
    """See `solver.minimum_capacity`. After `look_around`."""
    narrowing = search.narrowing(0, excess=True, clock=clock)
    found = narrowing.run(search.allowed)
    if found.relaxed.status != "optimal":  # out of time: the first answer may take longer
        narrowing.clock = Clock(None)
        found = narrowing.limited(search.allowed)
        if found.relaxed.status == "infeasible" and not search.is_whole():
            search.allowed = search.everything()
            found = narrowing.limited(search.allowed)
        if found.relaxed.status == "infeasible":
            raise InfeasibleProblem(NO_ASSIGNMENT)
    points: list[tuple[int, Solution]] = []

    def rounded(solution: Solution, priced: Evaluation) -> None:
        points.append((priced.peak_bytes, found.restricted.original(solution)))

    if found.relaxed.result is not None:
        search.offer_rounded(found.stage, found.relaxed, rounded)
    bound = found.relaxed.bound
    if search.is_small() or not points:  # else the rounded relaxation is good enough for a message
        bound = _search_least(found, points, gap)
    if not points:
        found.stage.clock = Clock(None)
        bound = _search_least(found, points, ROUGH_GAP)
    needed, solution = min(points, key=lambda item: item[0])
    if not search.is_whole():
        bound = min(bound, found.bound)
    return needed, min(needed, bytes_bound(found.stage, bound)), solution


def _search_least(found: Narrowed, points: list[tuple[int, Solution]], gap: float) -> float:
    def accept(solution: Solution, priced: Evaluation) -> None:
        points.append((priced.peak_bytes, found.restricted.original(solution)))

    return found.stage.search(found.relaxed, accept, np.inf, gap)


def explain(search: Search, *, proven: bool) -> None:
    """Raise InfeasibleProblem with the least memory that was found, unless that does fit after all.

    proven: that nothing fits.
    """
    left = search.clock.left_s()
    longest = explain_s(search)
    clock = Clock(longest if left is None else min(max(left, longest / 2), longest))
    # afresh, so that the answer does not depend on the limit that was asked for
    anew = type(search)(search.problem, gap=search.gap)
    anew.clock = clock
    anew.look_around()
    needed, bound, solution = least_memory(anew, clock, 0.0 if search.size() <= TINY else EXPLAIN_GAP)
    found = evaluate(search.problem, solution, search.lives)
    search.accept(solution, found)
    if search.best is not None:
        return
    limit = search.problem.capacity_bytes
    if proven and limit is not None:
        bound = max(bound, limit + 1)
    at = found.peak_time
    raise InfeasibleProblem(
        f"no solution fits in {limit} bytes: the smallest found needs {needed} bytes "
        f"(at op {search.problem.ops[at].name!r}); raise the capacity to that",
        needed,
        bound,
        at,
        solution,
        anew.bound_s,
    )
