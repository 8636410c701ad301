"""Identical layers: they cost the model nothing, whatever they share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autopar.solver import Choice, InfeasibleProblem, Op, Problem, Search, Value, solve
from autopar.solver.clock import Clock
from autopar.solver.lifetimes import lifetimes
from autopar.solver.stage import Stage

CONVERT_S = np.array([[0.0, 0.4], [0.3, 0.0]])
MIB = 1 << 20


def layers(count: int) -> Problem:
    """`count` layers that all take one value (as those of a model take its position embeddings), the last of them
    in the backward pass, too."""
    values = [Value("shared", (8 * MIB, 4 * MIB), CONVERT_S)]
    ops = [Op("make", (), (0,), (Choice(1.0, (), (0,)), Choice(1.1, (), (1,))))]
    choices = (Choice(1.0, (0,), (0,)), Choice(0.6, (1,), (1,)))
    for phase in ("forward", "backward"):
        first = len(ops)
        for layer in range(count):
            values.append(Value(f"{phase}{layer}", (2 * MIB, MIB), CONVERT_S))
            twin = first if layer else None
            ops.append(Op(f"{phase}{layer}", (0,), (len(values) - 1,), choices, twin_of=twin))
    return Problem(tuple(ops), tuple(values), forward_ops=1 + count)


def test_the_model_does_not_grow_with_uses_by_twins() -> None:
    def size(problem: Problem) -> tuple[int, int]:
        stage = Stage(problem, lifetimes(problem), Clock(None), 1.0, limit_bytes=64 * MIB)
        return len(stage.model.cost), len(stage.model.row_low)

    def apart(problem: Problem) -> Problem:
        return replace(problem, ops=tuple(replace(op, twin_of=None) for op in problem.ops))

    assert size(layers(3)) == size(layers(30))
    assert size(apart(layers(3))) < size(apart(layers(30)))
    assert solve(layers(5)).objective_s == pytest.approx(solve(apart(layers(5))).objective_s, rel=1e-9)


def test_what_it_would_take_is_found_when_it_is_asked_for() -> None:
    problem = replace(layers(3), capacity_bytes=MIB)
    with pytest.raises(InfeasibleProblem) as asked:
        solve(problem)
    search = Search(problem, gap=1e-4)
    search.look()
    with pytest.raises(InfeasibleProblem) as unasked:
        search.finish(explained=False)
    assert unasked.value.least is None
    later = search.explained()
    assert later.needed_bytes == asked.value.needed_bytes
    assert later.needed_bytes is not None and later.needed_bytes > MIB
