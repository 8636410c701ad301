"""Offload in the integer program: against enumeration, evaluated by hand, and what more of anything buys."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from autopar.solver import (
    Choice,
    InfeasibleProblem,
    InvalidSolution,
    Op,
    Problem,
    Solution,
    Value,
    brute_force,
    complete,
    evaluate,
    minimum_capacity,
    solve,
)
from autopar.solver.check import check_problem
from autopar.solver.evaluate import fits_host
from autopar.solver.exhaustive import every_solution
from autopar.solver.lifetimes import lifetimes
from tests.solver.generator import random_problem, with_capacity, with_offload

Priced = tuple[float, int, int]  # seconds, peak bytes of the device, bytes of the host


def everything(problem: Problem) -> list[Priced]:
    """Every solution: one enumeration serves all capacities of device and host."""
    lives = lifetimes(problem)
    found = []
    for solution in every_solution(problem, lives):
        with contextlib.suppress(InvalidSolution):  # an impossible conversion
            priced = evaluate(problem, solution, lives)
            found.append((priced.cost_s, priced.peak_bytes, priced.host_bytes))
    return found


def expected(found: list[Priced], device: int | None, host: int | None) -> tuple[str, float]:
    on_host = [(cost, peak) for cost, peak, there in found if host is None or there <= host]
    fitting = [cost for cost, peak in on_host if device is None or peak <= device]
    if fitting:
        return "optimal", min(fitting)
    return "infeasible", min((peak for _, peak in on_host), default=-1)


def outcome(problem: Problem) -> tuple[str, float]:
    """("optimal", seconds) or ("infeasible", bytes needed; -1 if no capacity helps)."""
    try:
        result = solve(problem, gap=0.0)
    except InfeasibleProblem as error:
        return "infeasible", -1 if error.needed_bytes is None else error.needed_bytes
    found = evaluate(problem, result.solution)
    assert found.cost_s == result.objective_s and fits_host(problem, found)
    assert problem.capacity_bytes is None or found.peak_bytes <= problem.capacity_bytes
    return result.status, result.objective_s


def limits(seed: int, found: list[Priced]) -> list[tuple[int | None, int | None]]:
    """(device, host): the least of the device with any host and with none, and some in between."""
    rng = random.Random(seed)
    least, most = min(peak for _, peak, _ in found), min(found)[1]
    host = max(there for *_, there in found)
    between = [(rng.randint(least, max(most, least)), rng.randint(0, max(host, 1))) for _ in range(2)]
    return [(None, 0), (least, None), (least, host // 2), (least - 1, None), *between]


@pytest.mark.parametrize("first", range(0, 100, 10))
def test_equals_brute_force(first: int) -> None:
    for seed in range(first, first + 10):
        problem = with_offload(random_problem(seed), seed)
        found = everything(problem)
        if not found:
            continue
        for device, host in limits(seed, found):
            limited = replace(problem, capacity_bytes=device, host_capacity_bytes=host)
            status, figure = outcome(limited)
            right = expected(found, device, host)
            assert (status, figure) == (right[0], pytest.approx(right[1], rel=1e-9)), f"seed {seed}, {device}, {host}"


def test_equals_brute_force_where_choices_come_in_by_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.solver.search.SMALL", 0)
    offloading = 0
    for seed in range(100, 110):
        problem = with_offload(random_problem(seed), seed)
        found = everything(problem)
        if not found:
            continue
        for device, host in limits(seed, found):
            right = expected(found, device, host)
            if right[0] == "optimal":
                limited = replace(problem, capacity_bytes=device, host_capacity_bytes=host)
                result = solve(limited, gap=0.0)
                assert result.objective_s == pytest.approx(right[1], rel=1e-9), f"seed {seed}, {device}, {host}"
                offloading += bool(result.solution.offloaded)
    assert offloading > 0


def test_brute_force_is_the_best_of_everything() -> None:
    for seed in range(4):
        problem = with_offload(random_problem(seed), seed)
        found = everything(problem)
        for device, host in limits(seed, found)[1:4] if found else []:
            limited = replace(problem, capacity_bytes=device, host_capacity_bytes=host)
            with contextlib.suppress(InfeasibleProblem):
                assert brute_force(limited).objective_s == expected(found, device, host)[1]


# -- what more of anything buys ------------------------------------------------


def linked(problem: Problem, seconds: Callable[[Value], tuple[float, ...] | None]) -> Problem:
    return replace(problem, values=tuple(replace(v, offload_s=seconds(v)) for v in problem.values))


def twice_as_fast(value: Value) -> tuple[float, ...] | None:
    return None if value.offload_s is None else tuple(s / 2 for s in value.offload_s)


def cost(problem: Problem) -> float:
    try:
        return solve(problem, gap=0.0).objective_s
    except InfeasibleProblem:
        return np.inf


def test_more_memory_or_a_faster_link_never_costs() -> None:
    better = 0
    for seed in range(200, 240):
        problem = with_offload(random_problem(seed), seed)
        try:
            least = minimum_capacity(problem)[0]
        except InfeasibleProblem:
            continue
        rng = random.Random(seed)
        limited = replace(problem, capacity_bytes=least + rng.randint(0, 20), host_capacity_bytes=rng.randint(0, 60))
        now = cost(limited)
        more_memory = cost(with_capacity(limited, limited.capacity_bytes + 10))
        more_host = cost(replace(limited, host_capacity_bytes=limited.host_capacity_bytes + 20))
        faster = cost(linked(limited, twice_as_fast))
        no_link = linked(limited, lambda value: None)
        assert max(more_memory, more_host, faster) <= now * (1 + 1e-9) <= cost(no_link) * (1 + 2e-9)
        better += faster < now * (1 - 1e-6)
    assert better > 1


def layers(count: int, seed: int) -> Problem:
    """A chain of ops, each of whose results waits for its own op of the backward pass."""
    rng, still = random.Random(seed), np.zeros((1, 1))
    sizes = [rng.randint(10, 30) for _ in range(count)]
    seconds = [rng.randint(1, 40) / 64 for _ in range(count)]
    values = [Value(f"a{i}", (n,), still, offload_s=(s,)) for i, (n, s) in enumerate(zip(sizes, seconds, strict=True))]
    values += [Value(f"d{i}", (1,), still) for i in range(count)]
    one = Choice(1.0, (), (0,))
    ops = [Op(f"f{i}", (i - 1,) if i else (), (i,), (replace(one, uses=(0,) if i else ()),)) for i in range(count)]
    for i in range(count):
        operands = (count - 1 - i, *((count + i - 1,) if i else ()))
        ops.append(Op(f"b{i}", operands, (count + i,), (replace(one, uses=(0,) * len(operands)),)))
    return Problem(tuple(ops), tuple(values), forward_ops=count)


def cheapest_to_leave(problem: Problem, capacity: int) -> float:
    """What the chain costs at best, by trying every set that leaves."""
    count, found = problem.forward_ops, np.inf
    for picked in range(1 << count):
        away = [v for v in range(count) if picked >> v & 1]
        priced = evaluate(problem, complete(problem, (0,) * (2 * count), [], [], offloaded=away))
        if priced.peak_bytes <= capacity:
            found = min(found, priced.cost_s)
    return found


def test_what_leaves_is_the_cheapest_that_makes_room() -> None:
    problem = layers(9, 3)
    whole = solve(problem).peak_bytes
    assert whole == evaluate(problem, complete(problem, (0,) * 18, [], [])).peak_bytes
    for share in (0.9, 0.7, 0.5):
        limited = with_capacity(problem, int(whole * share))
        result = solve(limited, gap=0.0)
        assert result.solution.offloaded
        assert result.objective_s == pytest.approx(cheapest_to_leave(problem, int(whole * share)), rel=1e-9)


# -- by hand -------------------------------------------------------------------


def chain(offload_s: float | None = 3.0, **flags: bool) -> Problem:
    """make -> f | b(made by f) -> c(b, made by make): the first value, of 10 bytes, waits while b runs."""
    still = np.zeros((1, 1))
    away = None if offload_s is None else (offload_s,)
    values = (Value("a", (10,), still, offload_s=away, **flags), *(Value(n, (4,), still) for n in "xyz"))
    one = (Choice(1.0, (0,), (0,)),)
    ops = (
        Op("make", (), (0,), (Choice(1.0, (), (0,)),)),
        Op("f", (0,), (1,), one),
        Op("f2", (1,), (2,), one),
        Op("c", (2, 0), (3,), (Choice(1.0, (0, 0), (0,)),)),
        Op("end", (3,), (), (Choice(0.0, (0,), ()),)),
    )
    return Problem(ops, values, forward_ops=3)


def test_what_is_offloaded_is_away_between_the_passes() -> None:
    problem = chain()
    kept = evaluate(problem, complete(problem, (0,) * 5, [], []))
    away = evaluate(problem, complete(problem, (0,) * 5, [], [], offloaded=[0]))
    #                        make  f       f2                c
    assert kept.memory_bytes.tolist() == [10, 10 + 4, 10 + 4 + 4, 10 + 4 + 4, 4]
    assert away.memory_bytes.tolist() == [10, 10 + 4, 4 + 4, 10 + 4 + 4, 4]
    assert away.memory_by_category["fetched"].tolist() == [0, 0, 0, 10, 0]
    assert (kept.cost_s, away.cost_s, away.offload_s) == (4.0, 7.0, 3.0)
    assert (kept.host_bytes, away.host_bytes) == (0, 10)


def test_what_may_not_stay_is_offloaded_however_much_memory_there_is() -> None:
    result = solve(chain(may_keep=False))
    assert result.solution.offloaded == {0} and result.objective_s == 7.0
    with pytest.raises(InfeasibleProblem, match="wanted there"):
        solve(chain(None, may_keep=False))
    with pytest.raises(InfeasibleProblem):
        solve(replace(chain(may_keep=False), host_capacity_bytes=9))


def test_optimizer_state_goes_to_the_host_where_it_must() -> None:
    """A choice of a parameter may put its state there."""
    problem = chain(None)
    ways = (Choice(1.0, (), (0,), persistent_bytes=30), Choice(1.5, (), (0,), persistent_bytes=10, host_bytes=20))
    problem = replace(problem, ops=(replace(problem.ops[0], choices=ways), *problem.ops[1:]))
    assert solve(problem).solution.choices[0] == 0
    tight = solve(with_capacity(problem, 40), gap=0.0)
    assert tight.solution.choices[0] == 1 and tight.objective_s == 4.5
    assert evaluate(problem, tight.solution).host_bytes == 20
    with pytest.raises(InfeasibleProblem):
        solve(replace(problem, capacity_bytes=40, host_capacity_bytes=19))


@pytest.mark.parametrize(
    ("solution", "message"),
    [
        (Solution((0,) * 5, frozenset(), frozenset({0}), frozenset(), frozenset({0})), "both kept and offloaded"),
        (Solution((0,) * 5, frozenset(), frozenset({0}), frozenset(), frozenset({2})), "cannot be offloaded"),
        (Solution((0,) * 5, frozenset(), frozenset({2}), frozenset()), "not there"),
    ],
)
def test_solutions_that_contradict_themselves(solution: Solution, message: str) -> None:
    with pytest.raises(InvalidSolution, match=message):
        evaluate(chain(), solution)


def test_what_must_not_be_kept_is_not() -> None:
    solution = Solution((0,) * 5, frozenset(), frozenset({0, 2}), frozenset())
    with pytest.raises(InvalidSolution, match="must not be"):
        evaluate(chain(may_keep=False), solution)


def test_seconds_that_make_no_sense_are_refused() -> None:
    problem = chain()
    for seconds in ((-1.0,), (1.0, 2.0), (float("nan"),)):
        values = (replace(problem.values[0], offload_s=seconds), *problem.values[1:])
        with pytest.raises(ValueError, match="offload_s"):
            check_problem(replace(problem, values=values))
