"""`evaluate` by hand-made numbers, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autopar.solver import Choice, InvalidSolution, Op, Problem, Solution, Value, evaluate, solve


def value(name: str, *, always: bool = False, live_out: bool = False) -> Value:
    """Two states: 0 takes 10 bytes, 1 takes 4. Converting 0 -> 1 costs 1 s, 1 -> 0 costs 2 s."""
    return Value(name, (10, 4), np.array([[0.0, 1.0], [2.0, 0.0]]), always, live_out)


@pytest.fixture
def problem() -> Problem:
    """param -> f0 -> f1 | b0(f1) -> b1(b0, f0) -> grad."""
    both = (Choice(0.0, (), (0,), persistent_bytes=30), Choice(0.0, (), (1,), persistent_bytes=12))
    ops = (
        Op("param", (), (0,), both),
        Op("f0", (0,), (1,), (Choice(8.0, (0,), (0,), workspace_bytes=3), Choice(4.0, (0,), (1,))), recompute_time=4),
        Op("f1", (1,), (2,), (Choice(16.0, (1,), (0,)),)),
        Op("b0", (2,), (3,), (Choice(32.0, (0,), (0,)),)),
        Op("b1", (3, 1), (4,), (Choice(64.0, (0, 1), (0,)),)),
        Op("grad", (4,), (5,), (Choice(0.0, (0,), (0,)), Choice(0.0, (1,), (1,))), tied_to=0, results_start_next=True),
        Op("end", (5,), (), (Choice(0.0, (0,), ()),)),
    )
    values = (value("w", always=True), *(value(n) for n in ("a", "b", "db", "dw")), value("grad", live_out=True))
    return Problem(ops, values, forward_ops=3, constant_bytes=100)


def decide(choices: tuple[int, ...], recomputed=(), kept=(), copies=()) -> Solution:
    return Solution(choices, frozenset(recomputed), frozenset(kept), frozenset(copies))


def test_kept_original(problem: Problem) -> None:
    # a is made in 0 (10), converted to 1 (4) for f1 and again for b1; b is kept for b0
    found = evaluate(problem, decide((0, 0, 0, 0, 0, 0, 0), kept=(1, 2)))
    assert found.cost_s == 8 + 16 + 32 + 64 + 1 + 1
    assert (found.convert_s, found.convert_backward_s, found.recompute_s) == (1.0, 1.0, 0.0)
    #                                    a kept             a kept, copy       grad from its next time on
    assert (found.memory_bytes - 130).tolist() == [0, 13, 10 + 10 + 4, 10 + 10 + 10, 10 + 10 + 10 + 4, 10, 10]
    assert (found.peak_bytes, found.peak_time) == (130 + 34, 4)


def test_kept_copy(problem: Problem) -> None:
    found = evaluate(problem, decide((0, 0, 0, 0, 0, 0, 0), kept=(2,), copies=((1, 1),)))
    assert found.cost_s == 8 + 16 + 32 + 64 + 1
    assert (found.memory_bytes - 130).tolist() == [0, 13, 10 + 10 + 4, 4 + 10 + 10, 4 + 10 + 10, 10, 10]


def test_recomputed(problem: Problem) -> None:
    found = evaluate(problem, decide((0, 1, 0, 0, 0, 0, 0), recomputed=(1,), kept=(2,)))
    assert found.cost_s == 4 + 16 + 32 + 64 + 4
    assert found.recompute_s == 4.0
    assert (found.memory_bytes - 130).tolist() == [0, 4, 4 + 10, 10 + 10, 4 + 10 + 10, 10, 10]


def test_gradient_is_the_converted_copy(problem: Problem) -> None:
    # the parameter in state 1: gathered for f0 (10 bytes), its gradient converted 0 -> 1 at time 5
    found = evaluate(problem, decide((1, 1, 0, 0, 0, 1, 0), kept=(1, 2)))
    assert found.cost_s == 4 + 16 + 32 + 64 + 2 + 1 + 2
    assert (found.memory_bytes - 112).tolist() == [0, 4 + 10, 4 + 10, 4 + 10 + 10, 4 + 10 + 10, 10 + 4, 4 + 10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": (0, 0, 0, 0, 0, 0)}, "6 choices for 7 ops"),
        ({"choices": (0, 2, 0, 0, 0, 0, 0)}, "'f0' has no choice 2"),
        ({"choices": (0, 0, 0, 0, 0, 1, 0)}, "'grad' must take the choice of op 'param'"),
        ({"recomputed": frozenset({2})}, "op 2 is recomputed but may not run twice"),
        ({"kept": frozenset({1})}, "'b' is not there when op 'b0' wants it at time 3"),
        ({"kept": frozenset({2})}, "'a' is not there when op 'b1' wants it at time 4"),
        ({"kept": frozenset({1, 2, 3})}, "value 3 is kept but is not a value of the forward pass"),
        ({"kept_copies": frozenset({(2, 1)})}, "'b' keeps a copy in state 1 that forward never makes"),
    ],
)
def test_refuses_what_breaks_a_rule(problem: Problem, change: dict, message: str) -> None:
    valid = decide((0, 0, 0, 0, 0, 0, 0), kept=(1, 2))
    with pytest.raises(InvalidSolution, match=message):
        evaluate(problem, replace(valid, **change))


def test_refuses_an_impossible_conversion(problem: Problem) -> None:
    stuck = replace(problem.values[1], convert_s=np.array([[0.0, np.inf], [2.0, 0.0]]))
    values = (problem.values[0], stuck, *problem.values[2:])
    with pytest.raises(InvalidSolution, match="'a' cannot go from state 0 to 1"):
        evaluate(replace(problem, values=values), decide((0, 0, 0, 0, 0, 0, 0), kept=(1, 2)))


def test_solve_finds_the_best_of_these(problem: Problem) -> None:
    assert solve(problem, gap=0.0).objective_s == 4 + 16 + 32 + 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operands": (4,)}, "before it is made"),
        ({"choices": ()}, "has no choice"),
        ({"choices": (Choice(-1.0, (0,), (0,)),)}, "not negative"),
        ({"choices": (Choice(1.0, (2,), (0,)),)}, "names state 2 of value"),
        ({"recompute_time": 1}, "may run again at 1"),
        ({"tied_to": 5}, "is tied to 5"),
    ],
)
def test_a_problem_that_breaks_the_contract_is_refused(problem: Problem, change: dict, message: str) -> None:
    ops = list(problem.ops)
    ops[1] = replace(ops[1], **change)
    with pytest.raises(ValueError, match=message):
        solve(replace(problem, ops=tuple(ops)))
