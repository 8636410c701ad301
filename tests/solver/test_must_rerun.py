"""Ops that must run again: the solver equals brute force, with memory free and limited."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autopar.solver import InfeasibleProblem, Problem, Solution
from autopar.solver import solve as solve_problem
from autopar.solver.check import check_problem
from autopar.solver.evaluate import InvalidSolution, complete, evaluate
from autopar.solver.exhaustive import brute_force
from tests.solver.generator import random_problem, with_capacity


def forced(seed: int) -> Problem | None:
    """A random problem of whose ops some must run again; None if none may."""
    problem, rng = random_problem(seed), random.Random(seed)
    may = [o for o, op in enumerate(problem.ops) if op.recompute_time is not None]
    if not may:
        return None
    must = {o for o in may if rng.random() < 0.6} or {may[0]}
    return replace(problem, ops=tuple(replace(op, must_rerun=o in must) for o, op in enumerate(problem.ops)))


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_equals_brute_force(start: int) -> None:
    compared = 0
    for seed in range(start, start + 20):
        problem = forced(seed)
        if problem is None:
            continue
        try:
            free = brute_force(problem)
        except InfeasibleProblem:  # running again would need an impossible conversion
            with pytest.raises(InfeasibleProblem):
                solve_problem(problem)
            continue
        for capacity in (None, free.peak_bytes):
            limited = with_capacity(problem, capacity)
            expected = brute_force(limited)
            found = solve_problem(limited, gap=0.0)
            assert found.objective_s == pytest.approx(expected.objective_s, rel=1e-9), (seed, capacity)
            assert found.bound_s == pytest.approx(expected.objective_s, rel=1e-6), (seed, capacity)
            must = {o for o, op in enumerate(problem.ops) if op.must_rerun}
            assert must <= found.solution.recomputed
            compared += 1
    assert compared > 10


def test_a_solution_without_it_is_refused() -> None:
    problem = next(p for p in map(forced, range(100)) if p is not None)
    solution = solve_problem(problem).solution
    with pytest.raises(InvalidSolution, match="must run again"):
        evaluate(problem, Solution(solution.choices, frozenset(), solution.kept, solution.kept_copies))
    assert complete(problem, solution.choices, [], []).recomputed >= {
        o for o, op in enumerate(problem.ops) if op.must_rerun
    }


def test_an_op_that_may_not_run_twice_cannot_have_to() -> None:
    problem = random_problem(0)
    op = next(o for o, op in enumerate(problem.ops) if op.recompute_time is None)
    ops = (*problem.ops[:op], replace(problem.ops[op], must_rerun=True), *problem.ops[op + 1 :])
    with pytest.raises(ValueError, match="must run again but has no recompute_time"):
        check_problem(replace(problem, ops=ops))
