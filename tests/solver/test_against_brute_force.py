"""The solver against enumeration, on small problems that have everything in them."""

from __future__ import annotations

import contextlib
import random

import pytest

from autopar.solver import (
    InfeasibleProblem,
    InvalidSolution,
    Problem,
    brute_force,
    evaluate,
    minimum_capacity,
    solve,
)
from autopar.solver.exhaustive import every_solution
from autopar.solver.lifetimes import lifetimes
from tests.solver.generator import random_problem, with_capacity


def outcome(problem: Problem, solver) -> tuple[str, float]:
    """("optimal", seconds) or ("infeasible", bytes needed; -1 if no capacity helps)."""
    try:
        result = solver(problem)
    except InfeasibleProblem as error:
        return "infeasible", -1 if error.needed_bytes is None else error.needed_bytes
    assert evaluate(problem, result.solution).cost_s == result.objective_s
    if problem.capacity_bytes is not None:
        assert evaluate(problem, result.solution).peak_bytes == result.peak_bytes <= problem.capacity_bytes
    return result.status, result.objective_s


def everything(problem: Problem) -> list[tuple[float, int]]:
    """(cost, peak) of every solution: one enumeration serves all capacities."""
    lives = lifetimes(problem)
    found = []
    for solution in every_solution(problem, lives):
        with contextlib.suppress(InvalidSolution):  # an impossible conversion
            priced = evaluate(problem, solution, lives)
            found.append((priced.cost_s, priced.peak_bytes))
    return found


def expected(found: list[tuple[float, int]], capacity: int | None) -> tuple[str, float]:
    fitting = [cost for cost, peak in found if capacity is None or peak <= capacity]
    if fitting:
        return "optimal", min(fitting)
    return "infeasible", min((peak for _, peak in found), default=-1)


def capacities(seed: int, found: list[tuple[float, int]]) -> list[int | None]:
    """No cap, the least, one less, and two in between."""
    if not found:
        return [None]
    least, (_, most) = min(peak for _, peak in found), min(found)
    rng = random.Random(seed)
    return [None, least, least - 1, *(rng.randint(least, most) for _ in range(2))]


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_equals_brute_force(first: int) -> None:
    statuses = set()
    for seed in range(first, first + 20):
        problem = random_problem(seed)
        found = everything(problem)
        for capacity in capacities(seed, found):
            status, figure = outcome(with_capacity(problem, capacity), lambda p: solve(p, gap=0.0))
            right = expected(found, capacity)
            assert (status, figure) == (right[0], pytest.approx(right[1], rel=1e-9)), f"seed {seed}, {capacity} bytes"
            statuses.add(status)
    assert statuses == {"optimal", "infeasible"}


def test_brute_force_is_the_best_of_everything() -> None:
    for seed in range(10):
        problem = random_problem(seed)
        found = everything(problem)
        for capacity in capacities(seed, found):
            assert outcome(with_capacity(problem, capacity), brute_force) == expected(found, capacity)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_minimum_capacity_equals_brute_force(first: int) -> None:
    for seed in range(first, first + 20):
        problem = random_problem(seed)
        _, least = expected(everything(problem), 0)
        if least == -1:
            with pytest.raises(InfeasibleProblem, match="conversions possible"):
                minimum_capacity(problem)
            continue
        needed, bound, solution = minimum_capacity(problem)
        assert (needed, bound) == (least, least), f"seed {seed}"
        assert evaluate(problem, solution).peak_bytes == needed
