"""The slow and obvious way: try everything. For tests and for problems of a handful of ops."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import TypeVar

from autopar.solver.check import check_problem
from autopar.solver.evaluate import InvalidSolution, complete, evaluate, fits_host
from autopar.solver.lifetimes import ValueLife, lifetimes
from autopar.solver.problem import NO_ASSIGNMENT, InfeasibleProblem, Least, Problem, Solution, SolveResult

T = TypeVar("T")


def brute_force(problem: Problem) -> SolveResult:
    """The cheapest solution that fits, by enumeration. Raises InfeasibleProblem with the exact minimum."""
    started = time.perf_counter()
    check_problem(problem)
    lives = lifetimes(problem)
    best: tuple[float, int, int, Solution] | None = None
    least: Least | None = None
    for solution in every_solution(problem, lives):
        try:
            found = evaluate(problem, solution, lives)
        except InvalidSolution:  # an impossible conversion
            continue
        if not fits_host(problem, found):
            continue
        if least is None or found.peak_bytes < least.needed_bytes:
            least = Least(found.peak_bytes, found.peak_bytes, found.peak_time, solution, 0.0)
        fits = problem.capacity_bytes is None or found.peak_bytes <= problem.capacity_bytes
        if fits and (best is None or found.cost_s < best[0]):
            best = (found.cost_s, found.peak_bytes, found.peak_time, solution)
    if best is None:
        if least is None:
            raise InfeasibleProblem(NO_ASSIGNMENT)
        raise InfeasibleProblem(f"needs {least.needed_bytes} bytes", least)
    cost_s, peak_bytes, peak_time, solution = best
    seconds = time.perf_counter() - started
    return SolveResult(solution, "optimal", cost_s, cost_s, 0.0, peak_bytes, peak_time, seconds)


def every_solution(problem: Problem, lives: tuple[ValueLife, ...]) -> Iterator[Solution]:
    """All solutions that keep no more than they must (keeping more costs memory and buys nothing)."""
    may_rerun = [o for o, op in enumerate(problem.ops) if op.recompute_time is not None and op.twin_of is None]
    both = [(o, op) for o, op in enumerate(problem.ops) if op.recompute_time is not None]
    twins = {o: op.twin_of for o, op in both if op.twin_of is not None}
    free = [o for o, op in enumerate(problem.ops) if op.tied_to is None and op.twin_of is None]
    for picks in itertools.product(*(range(len(problem.ops[o].choices)) for o in free)):
        choices = _with_tied(problem, dict(zip(free, picks, strict=True)))
        for leaders in _subsets(may_rerun):
            again = (*leaders, *(o for o, leader in twins.items() if leader in leaders))
            all_copies = [(v, s) for v, life in enumerate(lives) if life.later_uses for s in _states(problem, v)]
            useful = sorted(complete(problem, choices, again, all_copies, lives).kept_copies)
            for copies in _subsets(useful):
                kept = complete(problem, choices, again, copies, lives).kept
                for away in _subsets(sorted(v for v in kept if problem.values[v].offload_s is not None)):
                    yield complete(problem, choices, again, copies, lives, away)


def _states(problem: Problem, v: int) -> range:
    return range(len(problem.values[v].state_bytes))


def _with_tied(problem: Problem, picked: dict[int, int]) -> tuple[int, ...]:
    choices: list[int] = []
    for o, op in enumerate(problem.ops):
        leader = op.twin_of if op.twin_of is not None else op.tied_to
        choices.append(picked[o] if leader is None else choices[leader])
    return tuple(choices)


def _subsets(items: list[T]) -> Iterator[tuple[T, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(items, n) for n in range(len(items) + 1))
