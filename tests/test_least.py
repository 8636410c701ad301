"""The least memory that an Infeasible names is a promise: with that limit there is a plan, in whatever time."""

from __future__ import annotations

from typing import Any

import pytest

import autopar
import autopar.mesh_search
from autopar.errors import Infeasible
from autopar.mesh_search import MeshSearch
from autopar.plans import Plan
from autopar.solver import InfeasibleProblem, evaluate, solve
from tests.models import tiny_llama, tiny_mlp
from tests.solver.generator import with_capacity
from tests.solver.transformer import TransformerProblem

MODELS = {"mlp": tiny_mlp, "llama": lambda: tiny_llama(layers=1)}


def make(name: str, gpus: int, **options: Any) -> Plan:
    model, call = MODELS[name]()
    return autopar.plan(model, autopar.ClusterSpec.preset("h100-sxm", gpus=gpus), example_inputs=call, **options)


def needed(name: str, gpus: int, limit: int, **options: Any) -> int:
    with pytest.raises(Infeasible) as error:
        make(name, gpus, memory_limit_bytes=limit, **options)
    assert error.value.needed_bytes is not None and error.value.needed_bytes > limit
    return error.value.needed_bytes


@pytest.mark.parametrize(("name", "gpus"), [("mlp", 2), ("mlp", 4), pytest.param("llama", 2, marks=pytest.mark.slow)])
def test_what_is_needed_is_enough(name: str, gpus: int) -> None:
    least = needed(name, gpus, 1, time_limit_s=5.0)
    for time_limit_s in (5.0, 0.01):
        plan = make(name, gpus, memory_limit_bytes=least, time_limit_s=time_limit_s)
        assert plan.predicted["peak_bytes"] <= least
    with pytest.raises(Infeasible):
        make(name, gpus, memory_limit_bytes=least // 2, time_limit_s=0.01)


def test_the_leanest_plan_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the programs of all leaner plans turn out larger than the solver thought."""
    least = needed("mlp", 2, 1, pin={"mesh": [2]})
    fits = MeshSearch.fits
    monkeypatch.setattr(MeshSearch, "fits", lambda self: fits(self) and self.status == "leanest")
    monkeypatch.setattr(autopar.mesh_search, "_MAX_LEANER", 2)
    plan = make("mlp", 2, memory_limit_bytes=2 * least, pin={"mesh": [2]})
    assert plan.predicted["peak_bytes"] <= 2 * least
    assert [c.status for c in plan.candidates] == ["leanest"]


@pytest.mark.parametrize("mesh", [(8,), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_the_leanest_solution_depends_on_no_limit(mesh: tuple[int, ...]) -> None:
    problem = TransformerProblem.build(layers=1, mesh=mesh)
    found = []
    for capacity, time_limit_s in ((1, None), (1, 0.0), (1 << 16, 0.5)):
        with pytest.raises(InfeasibleProblem) as error:
            solve(with_capacity(problem, capacity), time_limit_s=time_limit_s)
        assert error.value.least is not None
        found.append(error.value.least)
    assert found[0].needed_bytes == evaluate(problem, found[0].solution).peak_bytes
    assert {(f.needed_bytes, f.solution) for f in found} == {(found[0].needed_bytes, found[0].solution)}
    enough = solve(with_capacity(problem, found[0].needed_bytes), time_limit_s=0.0)
    assert enough.peak_bytes <= found[0].needed_bytes
