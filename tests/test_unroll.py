"""Depth for free: an unrolled trace is the trace of all layers, and folding the solve changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import nn

from autopar.cluster import ClusterSpec
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.pricing import price
from autopar.sharding import build_problem
from autopar.solver import Problem, solve
from autopar.trace import Trace, graph_hash, trace
from autopar.tracing.repeated import repeated_layers, with_layers
from tests.models import ModelAndInputs, tiny_bert, tiny_llama

MAKERS = [tiny_llama, tiny_bert]


@pytest.mark.parametrize("make", MAKERS)
def test_unrolled_equals_flat(make: Callable[..., ModelAndInputs]) -> None:
    model, call = make(layers=5)
    unrolled, flat = trace(model, call), trace(model, call, unrolled=False)
    assert unrolled.twins and not flat.twins
    assert graph_hash(unrolled) == graph_hash(flat)
    assert [p.fqn for p in unrolled.params] == [p.fqn for p in flat.params]
    assert list(unrolled.grads) == list(flat.grads)


def test_models_whose_layers_differ_are_traced_flat() -> None:
    model, call = tiny_llama(layers=4)
    model.model.layers[2].mlp.act_fn = nn.ReLU()  # type: ignore[union-attr,index]
    assert repeated_layers(model) is None
    assert not trace(model, call).twins


def test_fewer_layers_leave_the_model_alone() -> None:
    model, _ = tiny_llama(layers=4)
    found = repeated_layers(model)
    assert found == ("model.layers", 4)
    fewer = with_layers(model, found[0], [0, 3])
    assert len(fewer.model.layers) == 2 and len(model.model.layers) == 4  # type: ignore[arg-type,union-attr]
    assert fewer.model.layers[1] is model.model.layers[3]  # type: ignore[index,union-attr]


def _problem(traced: Trace, mesh: tuple[int, ...], capacity: int | None) -> tuple[Problem, object, CostModel]:
    costs = CostModel(ClusterSpec.preset("h100-sxm", gpus=4), mesh)
    stated = build_problem(traced, costs, OptimizerSpec("adamw"), capacity_bytes=capacity)
    return stated.problem, stated, costs


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("mesh", [(4,), (2, 2)])
def test_folded_solve_equals_unfolded(make: Callable[..., ModelAndInputs], mesh: tuple[int, ...]) -> None:
    """Without a memory limit layers have no reason to differ: the folded optimum is the unfolded one."""
    traced = trace(*make(layers=4))
    problem, stated, costs = _problem(traced, mesh, None)
    assert any(op.twin_of is not None for op in problem.ops)
    unfolded = replace(problem, ops=tuple(replace(op, twin_of=None) for op in problem.ops))
    folded_result, unfolded_result = solve(problem), solve(unfolded)
    assert folded_result.objective_s == pytest.approx(unfolded_result.objective_s, rel=2e-4)
    decisions = stated.decisions(folded_result.solution)  # type: ignore[attr-defined]
    priced = price(traced, decisions, costs, OptimizerSpec("adamw"))
    assert priced.step_time_s == pytest.approx(folded_result.objective_s, rel=1e-9)


def test_folded_is_never_better_than_unfolded_under_a_limit() -> None:
    """With a limit uniform layers are a restriction: the folded cost is an upper bound of the unfolded one."""
    traced = trace(*tiny_bert(layers=4))
    free = solve(_problem(traced, (4,), None)[0])
    problem, _, _ = _problem(traced, (4,), int(0.8 * free.peak_bytes))
    unfolded = replace(problem, ops=tuple(replace(op, twin_of=None) for op in problem.ops))
    folded_result, unfolded_result = solve(problem, time_limit_s=10), solve(unfolded, time_limit_s=10)
    assert folded_result.peak_bytes <= int(0.8 * free.peak_bytes)
    assert folded_result.objective_s >= unfolded_result.bound_s * (1 - 1e-6)
