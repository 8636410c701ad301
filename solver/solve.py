"""`solve`: the cheapest solution that fits; `minimum_capacity`: the least memory that any solution needs."""

from __future__ import annotations

import math
from collections.abc import Callable

from autopar.solver.clock import Clock
from autopar.solver.least import least_memory
from autopar.solver.linear import Floats
from autopar.solver.problem import Problem, Solution, SolveResult
from autopar.solver.search import Progress, Search


def solve(
    problem: Problem,
    *,
    time_limit_s: float | None = None,
    gap: float = 1e-4,
    progress: Callable[[Progress], None] | None = None,
    cutoff_s: float = math.inf,
    paid_s: Floats | None = None,
    whole: bool = False,
) -> SolveResult:
    """The cheapest solution within the capacity, to a relative `gap`.

    With a time limit the best solution found by then is returned, with the bound that was
    proven; without a cutoff, finding a first one may take longer than the limit.

    cutoff_s: only solutions cheaper than this (by more than the gap) are of interest. paid_s:
    prices of memory to start from (see `SolveResult.paid_s`), a guess that only saves time. whole:
    do not narrow the choices first, for a problem with few conversions, whose LP is fast anyway.

    Raises InfeasibleProblem; with a cutoff, NothingCheaper.
    """
    search = Search(problem, gap=gap, progress=progress, whole=whole)
    search.look(paid_s, time_limit_s=time_limit_s)
    left_s = None if time_limit_s is None else time_limit_s - search.clock.elapsed_s()
    return search.finish(cutoff_s=cutoff_s, time_limit_s=left_s)


def minimum_capacity(
    problem: Problem, time_limit_s: float | None = None, *, gap: float = 0.0
) -> tuple[int, int, Solution]:
    """(needed_bytes, bound_bytes, solution): the least peak found, a proven lower bound, who attains it.

    gap: relative, good enough; with a time limit, what was found and proven by then.
    """
    search = Search(problem, gap=0.0)
    search.clock = Clock(time_limit_s)
    search.look_around()
    return least_memory(search, search.clock, gap)
