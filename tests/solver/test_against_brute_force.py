"""The solver against enumeration, on small problems that have everything in them."""

from __future__ import annotations

import random

import pytest

from autopar.solver import InfeasibleProblem, Problem, brute_force, evaluate, minimum_capacity, solve
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


def capacities(seed: int, problem: Problem) -> list[int | None]:
    """No cap, the least, one less, and two in between."""
    try:
        free = brute_force(problem)
    except InfeasibleProblem:
        return [None]
    status, least = outcome(with_capacity(problem, 0), brute_force)
    assert status == "infeasible"
    assert least <= free.peak_bytes
    rng = random.Random(seed)
    between = [rng.randint(int(least), free.peak_bytes) for _ in range(2)]
    return [None, int(least), int(least) - 1, *between]


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_equals_brute_force(first: int) -> None:
    statuses = set()
    for seed in range(first, first + 20):
        problem = random_problem(seed)
        for capacity in capacities(seed, problem):
            capped = with_capacity(problem, capacity)
            expected = outcome(capped, brute_force)
            found = outcome(capped, lambda p: solve(p, gap=0.0))
            assert found == (expected[0], pytest.approx(expected[1], rel=1e-9)), f"seed {seed}, capacity {capacity}"
            statuses.add(found[0])
    assert statuses == {"optimal", "infeasible"}


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_minimum_capacity_equals_brute_force(first: int) -> None:
    for seed in range(first, first + 20):
        problem = random_problem(seed)
        _, expected = outcome(with_capacity(problem, 0), brute_force)
        if expected == -1:
            with pytest.raises(InfeasibleProblem, match="conversions possible"):
                minimum_capacity(problem)
            continue
        needed, bound, solution = minimum_capacity(problem)
        assert (needed, bound) == (expected, expected), f"seed {seed}"
        assert evaluate(problem, solution).peak_bytes == needed
