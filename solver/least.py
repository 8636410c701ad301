"""The least memory that any solution needs, and what it would take for a problem to have one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from autopar.solver.clock import Clock
from autopar.solver.evaluate import Evaluation, evaluate
from autopar.solver.lifetimes import Span, ValueLife
from autopar.solver.problem import NO_ASSIGNMENT, InfeasibleProblem, Least, Problem, Solution
from autopar.solver.stage import bytes_bound

if TYPE_CHECKING:
    from autopar.solver.search import Search

TINY = 200  # choices in all: below, the least memory is found exactly even where a rough figure would do
MODEST = 600  # choices in all: beyond, finding out whether anything fits gets more time
GRACE_S, LONGER_GRACE_S = 4.0, 12.0
WORK = 2e8  # of `Clock`, for the memory that an infeasible problem needs,
GAP = 1e-2  # to this precision, at best
ROUGH_GAP = 0.05  # where nothing else was found


def grace_s(search: Search) -> float:
    """Seconds that finding out whether anything fits may take."""
    return GRACE_S if search.size() <= MODEST else LONGER_GRACE_S


def least_memory(search: Search, clock: Clock, gap: float, *, rough: bool = False) -> tuple[int, int, Solution]:
    """See `solver.minimum_capacity`. After `look_around`. rough: what the first relaxation leads to will do."""
    narrowing = search.narrowing(0, excess=True, clock=clock)
    found = narrowing.run(search.allowed)
    if found.relaxed.result is None:  # the first answer may take longer
        narrowing.clock = Clock(None)
        found = narrowing.limited(search.allowed)
        if found.relaxed.status == "infeasible" and not search.is_whole():
            search.allowed = search.everything()
            found = narrowing.limited(search.allowed)
        if found.relaxed.status == "infeasible":
            raise InfeasibleProblem(NO_ASSIGNMENT)
    found.stage.clock = Clock(clock.left_s())
    points: list[tuple[int, Solution]] = []

    def accept(solution: Solution, priced: Evaluation) -> None:
        points.append((priced.peak_bytes, found.restricted.original(solution)))

    if found.relaxed.result is not None:
        search.offer_rounded(found.stage, found.relaxed, accept)
        found.stage.search_likely(found.relaxed, accept, gap)
    bound = found.relaxed.bound
    if not points or (search.is_small() and not rough):
        bound = found.stage.search(found.relaxed, accept, np.inf, gap)
    if not points:
        found.stage.clock = Clock(None)
        bound = found.stage.search(found.relaxed, accept, np.inf, ROUGH_GAP)
    needed, solution = min(points, key=lambda item: item[0])
    if not search.is_whole():
        bound = min(bound, found.bound)
    return needed, min(needed, bytes_bound(found.stage, bound)), solution


def find_least(search: Search) -> Least:
    """What a problem takes at least. It depends on nothing but the problem: not on its capacity, nor on the time that
    is left. So whoever comes back with as much memory as this says finds at least this solution."""
    anew = type(search)(replace(search.problem, capacity_bytes=None), gap=search.gap)
    anew.look_around()
    exact = search.size() <= TINY
    clock = Clock(None) if exact else Clock(None, WORK)
    needed, bound, solution = least_memory(anew, clock, 0.0 if exact else GAP, rough=not exact)
    found = evaluate(search.problem, solution, search.lives)
    return Least(needed, bound, found.peak_time, solution, anew.bound_s)


def least_conceivable(problem: Problem, lives: tuple[ValueLife, ...]) -> int:
    """Bytes that no solution can do without: every op and value at its smallest, whether or not they go together."""
    persistent, steps = problem.constant_bytes, np.zeros(len(problem.ops) + 1, dtype=np.int64)
    smallest: dict[int, tuple[int, int, list[set[int]]]] = {}
    for o, op in enumerate(problem.ops):
        if id(op.choices) not in smallest:  # identical layers share their choices
            held = (min(c.persistent_bytes for c in op.choices), min(c.workspace_bytes for c in op.choices))
            smallest[id(op.choices)] = (*held, [{c.makes[r] for c in op.choices} for r in range(len(op.results))])
        always, workspace, makes = smallest[id(op.choices)]
        persistent += always
        spans: list[tuple[Span | None, int]] = [((o, o), workspace)]
        for v, states in zip(op.results, makes, strict=True):
            spans.append((lives[v].base, min(problem.values[v].state_bytes[q] for q in states)))
        for span, nbytes in spans:
            if span is not None:
                steps[span[0]] += nbytes
                steps[span[1] + 1] -= nbytes
    return int(persistent + np.cumsum(steps).max(initial=0))


def infeasible(search: Search, least: Least, *, proven: bool) -> InfeasibleProblem:
    """That nothing fits, with what would. proven: that nothing does, whatever the bound says."""
    limit = search.problem.capacity_bytes
    if proven and limit is not None:
        least = replace(least, bound_bytes=max(least.bound_bytes, limit + 1))
    return InfeasibleProblem(
        f"no solution fits in {limit} bytes: the smallest found needs {least.needed_bytes} bytes "
        f"(at op {search.problem.ops[least.peak_time].name!r}); raise the capacity to that",
        least,
    )
