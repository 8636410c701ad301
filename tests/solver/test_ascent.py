"""The dual ascent against enumeration and against the LP: never above any solution, and close to the LP's bound."""

from __future__ import annotations

import itertools
import random
from functools import cache

import numpy as np
import pytest

from autopar.solver import InvalidSolution, NothingCheaper, Problem, Search, SolveResult, evaluate, solve
from autopar.solver.ascent import DualAscent
from autopar.solver.clock import Clock
from autopar.solver.exhaustive import every_solution
from autopar.solver.lifetimes import lifetimes
from autopar.solver.stage import Stage
from tests.solver.generator import random_problem, with_capacity, with_offload
from tests.solver.transformer import TransformerProblem

SCALE = 1e3
ROUNDING = 1e-6


def prices(problem: Problem, seed: int) -> np.ndarray:
    """Random prices of a byte up to each time, some 0."""
    rng = random.Random(seed)
    cheapest = sum(min(c.cost_s for c in op.choices) for op in problem.ops) * SCALE
    size = max(max(v.state_bytes, default=1) for v in problem.values) or 1
    at = [rng.choice((0.0, rng.random())) * cheapest / size / 5 for _ in problem.ops]
    return np.concatenate([[0.0], np.cumsum(at)])


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_no_solution_is_below_the_bound_or_its_margins(first: int) -> None:
    checked = 0
    for seed in range(first, first + 20):
        problem = with_capacity(random_problem(seed), 1000)
        if seed % 2:
            problem = with_offload(problem, seed)
        lives = lifetimes(problem)
        ascents = []
        for paid in (np.zeros(len(problem.ops) + 1), prices(problem, seed)):
            ascents.append((paid, DualAscent(problem, lives).run(SCALE, paid, 12, limit_bytes=1000)))
        for solution in itertools.islice(every_solution(problem, lives), 3000):
            try:
                found = evaluate(problem, solution, lives)
            except InvalidSolution:
                continue
            for paid, ascent in ascents:
                memory = found.memory_bytes @ np.diff(paid) - paid[-1] * 1000
                cost = found.cost_s * SCALE + memory
                worst = max(m[c] for m, c in zip(ascent.margins, solution.choices, strict=True))
                assert ascent.bound + worst <= cost + ROUNDING * max(1.0, abs(cost))
                checked += 1
    assert checked > 1000


@cache
def tight() -> tuple[Problem, SolveResult]:
    """Two layers, with a tenth less memory than the fastest solution wants, and their fastest solution then."""
    problem = TransformerProblem.build(layers=2, mesh=(2, 4))
    capped = with_capacity(problem, solve(problem, gap=1e-2).peak_bytes * 9 // 10)
    return capped, solve(capped, gap=1e-2)


def test_reaches_the_bound_of_the_lp() -> None:
    problem = TransformerProblem.build(layers=2, mesh=(2, 4))
    lives = lifetimes(problem)
    cheapest = sum(min(c.cost_s for c in op.choices) for op in problem.ops)
    stage = Stage(problem, lives, Clock(None), SCALE / cheapest, limit_bytes=None)
    exact = stage.relax().bound
    found = DualAscent(problem, lives).run(SCALE / cheapest, np.zeros(len(problem.ops) + 1), 40, limit_bytes=None)
    assert exact * 0.999 <= found.bound <= exact * (1 + 1e-9)


def test_a_cutoff_says_that_nothing_is_cheaper() -> None:
    capped, best = tight()
    assert best.paid_s is not None and (np.diff(best.paid_s) >= 0).all()
    with pytest.raises(NothingCheaper) as error:
        solve(capped, gap=1e-2, cutoff_s=best.objective_s * 0.985, paid_s=best.paid_s)
    assert error.value.bound_s <= best.objective_s * (1 + 1e-9)
    again = solve(capped, gap=1e-2, cutoff_s=best.objective_s * 1.05, paid_s=best.paid_s)
    assert again.objective_s <= best.objective_s * 1.011


def test_a_look_at_known_prices_proves_most_of_it() -> None:
    capped, best = tight()
    search = Search(capped, gap=1e-2)
    search.look(best.paid_s)
    assert best.objective_s * 0.97 <= search.bound_s <= best.objective_s * (1 + 1e-9)
