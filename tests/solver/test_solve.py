"""Properties of `solve` that do not need brute force: limits, order, honesty, repeatability."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.solver import InfeasibleProblem, Progress, brute_force, evaluate, minimum_capacity, solve
from tests.solver.generator import random_problem, with_capacity
from tests.solver.transformer import TransformerProblem


def feasible_seeds(count: int) -> list[int]:
    seeds = []
    for seed in range(1000, 1000 + 4 * count):
        try:
            minimum_capacity(random_problem(seed))
        except InfeasibleProblem:
            continue
        seeds.append(seed)
    return seeds[:count]


@given(seed=st.sampled_from(feasible_seeds(40)), parts=st.lists(st.floats(0, 1), min_size=2, max_size=4))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_lowering_the_cap_never_lowers_the_cost(seed: int, parts: list[float]) -> None:
    problem = random_problem(seed)
    least = minimum_capacity(problem)[0]
    most = solve(problem, gap=0.0).peak_bytes
    caps = sorted(least + int(part * (most - least)) for part in parts)
    costs = [solve(with_capacity(problem, cap), gap=0.0).objective_s for cap in caps]
    assert all(lower >= higher - 1e-9 for lower, higher in itertools.pairwise(costs))


def test_infeasible_says_what_would_fit() -> None:
    problem = random_problem(feasible_seeds(1)[0])
    with pytest.raises(InfeasibleProblem, match="raise the capacity") as caught:
        solve(with_capacity(problem, 0))
    error = caught.value
    assert error.needed_bytes is not None
    assert error.needed_bytes == error.bound_bytes
    assert error.peak_time in range(len(problem.ops))
    assert solve(with_capacity(problem, error.needed_bytes)).peak_bytes == error.needed_bytes


@pytest.fixture(scope="module")
def small_transformer():
    return TransformerProblem.build(layers=1, mesh=(8,))


@pytest.mark.parametrize("fraction", [None, 0.9])
def test_no_time_at_all_still_gives_a_valid_solution(small_transformer, fraction: float | None) -> None:
    free = solve(small_transformer)
    capacity = None if fraction is None else int(free.peak_bytes * fraction)
    problem = with_capacity(small_transformer, capacity)
    best = solve(problem, gap=0.0)
    hasty = solve(problem, time_limit_s=0.0)
    found = evaluate(problem, hasty.solution)
    assert found.cost_s == hasty.objective_s
    assert capacity is None or found.peak_bytes <= capacity
    assert hasty.bound_s <= best.objective_s * (1 + 1e-9) <= hasty.objective_s * (1 + 2e-9)
    assert hasty.gap == pytest.approx(1 - hasty.bound_s / hasty.objective_s, abs=1e-9)
    assert (hasty.status == "optimal") == (hasty.gap <= 1e-4)


@pytest.mark.parametrize("seed", [269, 920, 1547, 1846])
def test_no_time_at_all_where_rounding_fails(seed: int) -> None:
    """Memory is free, and yet what the relaxation rounds to needs conversions that cannot be."""
    free = with_capacity(random_problem(seed), None)
    hasty = solve(free, time_limit_s=0.0)
    assert hasty.objective_s == evaluate(free, hasty.solution).cost_s >= brute_force(free).objective_s - 1e-9


def test_a_transformer_within_memory(small_transformer) -> None:
    free = solve(small_transformer)
    assert free.status == "optimal"
    previous = free.objective_s
    for fraction in (0.95, 0.9):
        problem = with_capacity(small_transformer, int(free.peak_bytes * fraction))
        result = solve(problem)
        assert result.status == "optimal"
        assert result.gap <= 1e-4
        assert result.objective_s >= previous * (1 - 1e-4)
        assert evaluate(problem, result.solution).peak_bytes <= problem.capacity_bytes
        previous = result.objective_s


@pytest.mark.parametrize("fraction", [0.95, 0.9])
def test_choices_that_come_in_by_price(small_transformer, fraction: float, monkeypatch) -> None:
    problem = with_capacity(small_transformer, int(solve(small_transformer).peak_bytes * fraction))
    direct = solve(problem)
    monkeypatch.setattr("autopar.solver.search.SMALL", 0)
    priced = solve(problem)
    assert priced.status == "optimal"
    assert priced.objective_s == pytest.approx(direct.objective_s, rel=2e-4)


def test_all_choices_at_once_where_asked_for(small_transformer, monkeypatch) -> None:
    direct = solve(small_transformer)
    monkeypatch.setattr("autopar.solver.search.SMALL", 0)
    narrowed, whole = solve(small_transformer), solve(small_transformer, whole=True)
    assert whole.stats["free_columns"] > narrowed.stats["free_columns"]
    assert (whole.objective_s, whole.solution) == (direct.objective_s, direct.solution)


def test_choices_that_come_in_by_price_equal_brute_force(monkeypatch) -> None:
    monkeypatch.setattr("autopar.solver.search.SMALL", 0)
    for seed in feasible_seeds(25):
        problem = random_problem(seed)
        capped = with_capacity(problem, minimum_capacity(problem)[0] + 3)
        assert solve(capped, gap=0.0).objective_s == pytest.approx(brute_force(capped).objective_s, rel=1e-9)


@pytest.mark.parametrize(("seed", "capacity"), [(1, 112), (113, 201)])
def test_choices_that_come_in_to_show_that_something_fits_are_searched(seed: int, capacity: int, monkeypatch) -> None:
    """The first few choices do not fit: what is let in to see whether any do is part of the search from then on."""
    monkeypatch.setattr("autopar.solver.search.SMALL", 0)
    capped = with_capacity(random_problem(seed), capacity)
    assert solve(capped, gap=0.0).objective_s == pytest.approx(brute_force(capped).objective_s, rel=1e-9)


def test_same_input_same_output(small_transformer) -> None:
    problem = with_capacity(small_transformer, int(solve(small_transformer).peak_bytes * 0.9))
    first, second = solve(problem), solve(problem)
    assert first.solution == second.solution
    assert (first.objective_s, first.bound_s, first.stats) == (second.objective_s, second.bound_s, second.stats)


def test_progress_is_told_in_order(small_transformer) -> None:
    told: list[Progress] = []
    result = solve(small_transformer, progress=told.append)
    assert told
    assert all(a.bound_s <= b.bound_s and a.elapsed_s <= b.elapsed_s for a, b in itertools.pairwise(told))
    assert told[-1].incumbent_s == result.objective_s


def test_needs_no_torch_and_prints_nothing() -> None:
    code = (
        "import sys; from autopar.solver import solve; from tests.solver.generator import random_problem; "
        "solve(random_problem(1000)); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""
