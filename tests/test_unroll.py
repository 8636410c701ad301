"""Depth for free: an unrolled trace is the trace of all layers, and folding the solve changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.cluster import ClusterSpec
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.predicting.predict import call_to_sample
from autopar.pricing import price
from autopar.sharding import build_problem
from autopar.solver import Problem, solve
from autopar.trace import Trace, graph_hash, trace, trace_and_sample, trace_sample
from autopar.tracing.repeated import repeated_layers, with_layers
from tests.models import ModelAndInputs, tiny_bert, tiny_llama

MAKERS = [tiny_llama, tiny_bert]


@cache
def five_layers(make: Callable[..., ModelAndInputs]) -> tuple[nn.Module, Any, Trace]:
    """A model, its inputs, and their trace."""
    model, call = make(layers=5)
    return model, call, trace(model, call)


@pytest.mark.parametrize("make", MAKERS)
def test_unrolled_equals_flat(make: Callable[..., ModelAndInputs]) -> None:
    model, call, unrolled = five_layers(make)
    flat = trace(model, call, unrolled=False)
    assert unrolled.twins and not flat.twins
    assert graph_hash(unrolled) == graph_hash(flat)
    assert [p.fqn for p in unrolled.params] == [p.fqn for p in flat.params]
    assert list(unrolled.grads) == list(flat.grads)


@pytest.mark.parametrize("make", MAKERS)
def test_two_layers_of_another_batch_show_what_three_are_there(make: Callable[..., ModelAndInputs]) -> None:
    """One capture less, and nothing else: both traces are what a trace of each would be, names of nodes included."""
    model, call, direct = five_layers(make)
    _, other = call_to_sample(model, call)
    found, sample = trace_and_sample(model, call, other)
    traced = trace_sample(model, other)
    assert sample is not None and replace(sample, trace=traced.trace) == traced
    for made, wanted in ((found, direct), (sample.trace, traced.trace)):
        assert graph_hash(made) == graph_hash(wanted)
        nodes, expected = (list(t.graph_module.graph.nodes) for t in (made, wanted))
        assert [n.name for n in nodes] == [n.name for n in expected]
        assert [n.meta.get("module_path") for n in nodes] == [n.meta.get("module_path") for n in expected]
        same = replace(made, graph_module=wanted.graph_module)
        assert same == wanted
        pairs = zip(nodes, expected, strict=True)
        assert all(
            a.meta["val"].stride() == b.meta["val"].stride() for a, b in pairs if isinstance(b.meta["val"], Tensor)
        )


class Deep(nn.Module):
    """A loss that is multiplied by what `times` says of the inputs [batch, 8] and the number of layers."""

    def __init__(self, times: Callable[[Tensor, int], float]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6))
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for layer in self.layers:
            y = layer(y)
        return (y * self.times(x, len(self.layers))).sum()


@pytest.mark.parametrize(
    ("times", "unrolls", "says"),
    [
        (lambda x, layers: 1.0 / x.shape[0], True, True),
        (lambda x, layers: 3.0 * x.shape[0] ** 2, True, False),  # neither the same nor in proportion to the batch
        (lambda x, layers: 3.0 * layers, False, False),
        (lambda x, layers: 3.0 if x.shape[0] > 100 and layers == 3 else 5.0, False, False),
        (lambda x, layers: float(x.shape[0] * (4 if layers == 2 else 1)), False, False),
    ],
)
def test_what_depth_or_batch_changes_is_not_taken_over(
    times: Callable[[Tensor, int], float], unrolls: bool, says: bool
) -> None:
    model, call = Deep(times), ((torch.empty(128, 8, device="meta"),), {})
    found, sample = trace_and_sample(model, call, call_to_sample(model, call)[1])
    assert (bool(found.twins), sample is not None) == (unrolls, says)
    assert graph_hash(found) == graph_hash(trace(model, call, unrolled=False))


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
