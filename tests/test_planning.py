"""The search end to end: never slower than the usual layouts, honest about limits, gaps and pins."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import autopar
from autopar import ClusterSpec, Infeasible, Plan
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.errors import PinError
from autopar.mesh_search import MeshSearch
from autopar.pricing import price
from autopar.solver import InfeasibleProblem, Least, Solution, solve
from autopar.trace import trace
from tests.models import BATCH, TinyMLP, tiny_bert, tiny_llama, tiny_mlp
from tests.solver.transformer import TransformerProblem

MODELS: dict[str, Callable[[], Any]] = {
    "mlp": tiny_mlp,
    "bert": lambda: tiny_bert(layers=1),
    "llama": lambda: tiny_llama(layers=1),
}
USUAL: tuple[dict[str, Any], ...] = (
    {"dp": 8, "zero": 0},
    {"dp": 8, "zero": 3},
    {"tp": 8, "sp": False},
    {"tp": 8, "sp": True},
    {"dp": 2, "tp": 4, "zero": 3},
    {"dp": 4, "tp": 2, "zero": 3},
)
ROUNDING = 1e-9
SOLVER_GAP = 1e-4  # within which the search calls a plan optimal


def cluster(gpus: int) -> ClusterSpec:
    """Devices so slow, with launches so cheap, that sharding pays for models this small."""
    spec = ClusterSpec.preset("h100-sxm", gpus=gpus)
    device = replace(
        spec.device,
        peak_flops_per_s={d: rate * 1e-4 for d, rate in spec.device.peak_flops_per_s},
        memory_bytes_per_s=spec.device.memory_bytes_per_s * 1e-3,
        launch_overhead_s=1e-9,
        matmul_ramp_s=0.0,
    )
    links = tuple(replace(link, latency_s=1e-9) for link in spec.links)
    return replace(spec, device=device, links=links, collective_launch_s=1e-9)


def make(name: str, gpus: int = 8, **options: Any) -> Plan:
    model, call = MODELS[name]()
    return autopar.plan(model, cluster(gpus), example_inputs=call, **{"time_limit_s": 30, **options})


@cache
def free(name: str) -> Plan:
    return make(name)


@cache
def least_bytes(name: str) -> int:
    """The smallest limit that works, as Infeasible says."""
    with pytest.raises(Infeasible) as error:
        make(name, memory_limit_bytes=1000, time_limit_s=5)
    assert error.value.needed_bytes is not None
    return error.value.needed_bytes


@cache
def limits(name: str) -> dict[str, int]:
    replicated = make(name, pin={"dp": 8, "zero": 0})
    high, low = max(p.predicted["peak_bytes"] for p in (free(name), replicated)), least_bytes(name)
    return {"generous": high, "between": (high + low) // 2, "tight": low}


slow = pytest.mark.slow
each_model = pytest.mark.parametrize(
    "name", ["mlp", pytest.param("bert", marks=slow), pytest.param("llama", marks=slow)]
)


@each_model
@pytest.mark.parametrize("tightness", ["generous", "between", "tight"])
def test_never_slower_than_the_usual_layouts(name: str, tightness: str) -> None:
    limit = limits(name)[tightness]
    plan = make(name, memory_limit_bytes=limit)
    assert plan.predicted["peak_bytes"] <= limit
    compared = 0
    for pin in USUAL:
        try:
            usual = make(name, memory_limit_bytes=limit, pin=pin, time_limit_s=2)
        except Infeasible:
            continue
        compared += 1
        assert plan.objective_s <= usual.objective_s * (1 + SOLVER_GAP), pin
        assert plan.bound_s <= usual.objective_s * (1 + ROUNDING), pin
    assert compared == len(USUAL) or tightness != "generous"


@each_model
def test_sharding_pays(name: str) -> None:
    """The comparison above means something: the free plan cuts tensors and beats running replicated."""
    plan = free(name)
    assert any(p != "R" for state in plan.decisions.params.values() for p in state) or "dp" in plan.roles
    assert plan.objective_s < make(name, gpus=1).objective_s / 2


@each_model
def test_less_memory_is_never_faster(name: str) -> None:
    high, low = free(name).predicted["peak_bytes"], least_bytes(name)
    plans = [make(name, memory_limit_bytes=high - (high - low) * step // 5, time_limit_s=6) for step in range(6)]
    for step, plan in enumerate(plans):
        assert plan.predicted["peak_bytes"] <= high - (high - low) * step // 5
    for roomy, lean in itertools.pairwise(plans):
        assert lean.objective_s >= roomy.objective_s * (1 - max(roomy.gap, SOLVER_GAP))
        assert lean.objective_s >= roomy.bound_s
    if low < 0.99 * high:  # else the fastest plan is about the leanest, too
        assert plans[-1].objective_s > plans[0].objective_s
    assert plans[0].status == "optimal"


@each_model
def test_objective_is_the_price_from_scratch(name: str) -> None:
    model, call = MODELS[name]()
    for limit in limits(name).values():
        plan = make(name, memory_limit_bytes=limit, time_limit_s=5)
        priced = price(trace(model, call), plan.decisions, CostModel(plan.cluster, plan.mesh), OptimizerSpec("adamw"))
        assert plan.objective_s == pytest.approx(priced.step_time_s, rel=1e-9)
        assert plan.bound_s <= plan.objective_s
        assert plan.gap == pytest.approx(1 - plan.bound_s / plan.objective_s, abs=1e-12)


def test_same_input_same_bytes() -> None:
    """Two processes with different string hashing write the same file."""
    script = "from tests.test_planning import make; print(make('mlp', gpus=4).dumps())"
    texts = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."}
        root = Path(__file__).parent.parent
        run = subprocess.run(
            [sys.executable, "-c", script], cwd=root, env=env, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
        texts.append(run.stdout)
    assert texts[0] == texts[1] and len(texts[0]) > 1000


@pytest.mark.parametrize("time_limit_s", [0.0, 0.01])
def test_no_time_is_still_a_valid_plan(time_limit_s: float) -> None:
    """The bound is proven however little time there was: it is never above what more time finds."""
    model, call = MODELS["mlp"]()
    plan = make("mlp", time_limit_s=time_limit_s)
    best = free("mlp")
    assert best.status == "optimal"
    assert plan.bound_s <= best.objective_s * (1 + ROUNDING)
    assert plan.objective_s >= best.bound_s * (1 - ROUNDING)
    assert (plan.status == "optimal") == (plan.gap <= SOLVER_GAP * 1.01)
    assert autopar.verify(model, plan, example_inputs=call).ranks == 8


# -- limits ---------------------------------------------------------------------------------


@each_model
def test_infeasible_says_what_binds_and_the_limit_it_names_works(name: str) -> None:
    with pytest.raises(Infeasible) as error:
        make(name, memory_limit_bytes=1000, time_limit_s=5)
    message, needed = str(error.value), error.value.needed_bytes
    assert needed is not None and str(needed) in message and "\n" not in message
    assert error.value.where is not None and error.value.where in message
    assert "raise the limit" in message or "a memory limit of " in message
    assert make(name, memory_limit_bytes=needed, time_limit_s=5).predicted["peak_bytes"] <= needed
    with pytest.raises(Infeasible):
        make(name, memory_limit_bytes=int(needed * 0.8), time_limit_s=5)


# -- pins --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pin", "mesh", "roles"),
    [
        ({"dp": 8}, (8,), {"dp"}),
        ({"tp": 8}, (8,), {"tp"}),
        ({"dp": 2, "tp": 4}, (2, 4), {"dp", "tp"}),
        ({"tp": 2}, (4, 2), {"dp", "tp"}),
        ({"tp": (2, 4)}, (2, 4), {"tp"}),
        ({"tp": [2, 2, 2]}, (2, 2, 2), {"tp"}),
        ({"dp": 2, "tp": (2, 2)}, (2, 2, 2), {"dp", "tp"}),
        ({"tp": (2, 2)}, (2, 2, 2), {"dp", "tp"}),
        ({"mesh": [2, 4]}, (2, 4), None),
    ],
)
def test_layout_pins(pin: dict[str, Any], mesh: tuple[int, ...], roles: set[str] | None) -> None:
    plan = make("mlp", pin=pin)
    assert plan.mesh == mesh
    assert roles is None or set(plan.roles) == roles
    assert plan.objective_s >= free("mlp").bound_s * (1 - ROUNDING)


@pytest.mark.parametrize("zero", [0, 3])
def test_zero_pin(zero: int) -> None:
    plan = make("mlp", pin={"dp": 8, "zero": zero})
    cut = {fqn: state != ("R",) for fqn, state in plan.decisions.params.items()}
    assert cut and all(is_cut == (zero == 3) for is_cut in cut.values())


@pytest.mark.parametrize(
    ("pattern", "state"), [("up.weight", ("S(0)",)), ("down.*", ("R",)), ("*.weight", ("S(1)",)), ("up", ("S(0)",))]
)
def test_parameter_pins(pattern: str, state: tuple[str, ...]) -> None:
    plan = make("mlp", pin={"mesh": [8], pattern: state})
    pinned = [p for p in plan.decisions.params if fnmatchcase(p, pattern) or p.startswith(pattern + ".")]
    assert pinned and all(plan.decisions.params[p] == state for p in pinned)


def test_a_mesh_has_four_axes_at_most() -> None:
    with pytest.raises(PinError, match="a mesh of 5 axes, 2x2x2x2x2; at most 4"):
        make("mlp", gpus=32, pin={"tp": (2, 2, 2, 2, 2)})


def test_a_parameter_pinned_on_three_axes_gives_a_mesh_of_three() -> None:
    plan = make("mlp", pin={"up.weight": ("S(0)", "S(0)", "S(1)")})
    assert plan.mesh == (2, 2, 2) and plan.decisions.params["up.weight"] == ("S(0)", "S(0)", "S(1)")


def test_small_models_are_tried_on_three_axes() -> None:
    """A square mesh of three is among the candidates of a few ops, and never of a larger model."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.ReLU())
    call = ((torch.zeros(8, 64),), {})
    plan = autopar.plan(_Squared(model), cluster(8), example_inputs=call)
    assert (2, 2, 2) in {c.mesh for c in plan.candidates}
    assert {len(c.mesh) for c in make("mlp").candidates} == {1, 2}


class _Squared(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).square().mean()  # type: ignore[no-any-return]


def test_a_parameter_pin_skips_meshes_that_cannot_hold_it() -> None:
    """Two classes can be cut by the outer axis of 2x4, not by that of 4x2."""
    model, call = TinyMLP(classes=2), ((torch.zeros(BATCH, 64),), {"target": torch.zeros(BATCH, dtype=torch.long)})
    pin: dict[str, Any] = {"down.bias": ("S(0)", "R")}
    plan = autopar.plan(model, cluster(8), example_inputs=call, pin=pin, time_limit_s=5)
    assert plan.mesh == (2, 4) and plan.decisions.params["down.bias"] == ("S(0)", "R")
    says = r"down\.bias \(2,\) cannot be stored as asked for on mesh 2x4; possible there: R, R; S\(0\), R$"
    with pytest.raises(PinError, match=says):
        autopar.plan(model, cluster(8), example_inputs=call, pin={"down.bias": ("S(1)", "R")}, time_limit_s=5)


def test_stages_of_a_model_without_blocks() -> None:
    """Its modules are cut one after the other; more stages than modules there cannot be."""
    assert make("mlp", gpus=8, pin={"pp": 2}).layout()["pp"] == 2
    with pytest.raises(Infeasible, match="pp=8, but the model has"):
        make("mlp", gpus=8, pin={"pp": 8})


@pytest.mark.parametrize(
    ("pin", "says"),
    [
        ({"upp.weight": ("S(0)",), "mesh": [8]}, "up.weight"),
        ({"dwn": "recompute"}, "down"),
        ({"dp": 3}, "8 devices"),
        ({"dp": 2, "tp": 2}, "8 devices"),
        ({"mesh": [3, 3]}, "8 devices"),
        ({"dp": 0}, "positive"),
        ({"tp": (2, 0)}, "'tp' must be a positive integer, or one for each of several axes such as (2, 2), got [2, 0]"),
        ({"tp": (2, 2), "dp": 4}, "dp=4 x tp=2x2 = 16 do not make 8 devices"),
        ({"tp": (2, 2), "micro_batch": 2}, ": micro-batches take one axis a degree"),
        ({"ep": 2}, "no grouped products over experts"),
        ({"zero": 4}, "0, 1, 2 or 3"),
        ({"recompute": "some"}, "none, selective or full"),
        ({"up.weight": "S(x)"}, "placements"),
        ({"up.weight": ("P",), "mesh": [8]}, "cannot be stored"),
        ({"up.weight": ("S(0)", "R"), "mesh": [8]}, "2 placements"),
    ],
)
def test_pins_that_cannot_be(pin: dict[str, Any], says: str) -> None:
    with pytest.raises(PinError) as error:
        make("mlp", pin=pin)
    assert says in str(error.value) and "\n" not in str(error.value)


def recomputed(plan: Plan) -> set[str]:
    return {name for name, decision in plan.decisions.nodes.items() if decision.recompute}


@pytest.mark.parametrize("limit_fraction", [1.0, 0.9])
def test_recompute_pins(limit_fraction: float) -> None:
    """Recomputation is forced, or forbidden, or left open, where memory is plenty and where it is scarce."""
    high, low = free("mlp").predicted["peak_bytes"], least_bytes("mlp")
    limit = int(low + (high - low) * limit_fraction)
    plain = make("mlp", memory_limit_bytes=limit, time_limit_s=5)
    kept = make("mlp", memory_limit_bytes=max(limit, high), pin={"recompute": "none"})
    forced = make("mlp", memory_limit_bytes=limit, time_limit_s=5, pin={"recompute": "full"})
    assert not recomputed(kept)
    assert recomputed(forced)
    assert forced.objective_s > plain.objective_s
    proven = forced.objective_s == pytest.approx(forced.bound_s, rel=2 * SOLVER_GAP)
    assert proven or forced.status == "feasible"  # out of time, and it says so
    model, call = MODELS["mlp"]()
    assert autopar.verify(model, forced, example_inputs=call).ranks == 8


@slow
def test_recompute_pins_of_modules() -> None:
    """Pinned to recompute, ops of a module run again; pinned to keep they never do."""
    model, call = tiny_llama(layers=2)
    traced = trace(model, call)
    where = {n.name: str(n.meta.get("module_path", "")) for n in traced.graph_module.graph.nodes}

    def planned(pin: dict[str, Any]) -> Plan:
        options = {"example_inputs": call, "time_limit_s": 20, "pin": {"dp": 4, "zero": 0, **pin}}
        return autopar.plan(model, cluster(4), **options)  # type: ignore[arg-type]

    again = recomputed(planned({"layers.1.mlp": "recompute"}))
    assert again and all("layers.1.mlp" in where[n] for n in again)
    full = recomputed(planned({"recompute": "full"}))
    assert {where[n].split("layers.")[-1][0] for n in full} == {"0", "1"} and all("layers." in where[n] for n in full)
    mixed = recomputed(planned({"layers.1": "keep", "recompute": "full"}))
    assert mixed and all("layers.0" in where[n] for n in mixed)


def test_batch_that_does_not_divide() -> None:
    assert BATCH % 16
    with pytest.raises(PinError, match="global batch of 8 does not divide by dp=16"):
        make("mlp", gpus=16, pin={"dp": 16})


@pytest.mark.parametrize(("bound_bytes", "counts"), [(1, True), (1 << 60, False)])
def test_a_mesh_that_found_nothing_counts_unless_nothing_fits(
    bound_bytes: int, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of time is no proof: the bound of such a mesh belongs in the gap."""
    whole = MeshSearch.solve

    def none_on_8(
        self: MeshSearch, deadline: float, known: MeshSearch | None = None, *, explained: bool = True
    ) -> None:
        if self.mesh != (8,):
            return whole(self, deadline, known, explained=explained)
        return self._without_plan(
            Least(1 << 61, bound_bytes, 0, Solution((), frozenset(), frozenset(), frozenset()), 1e-9)
        )

    monkeypatch.setattr(MeshSearch, "solve", none_on_8)
    plan = make("mlp")
    assert plan.mesh != (8,)
    assert (plan.gap > 0.9) == counts


def test_a_search_that_fails_says_whether_that_is_proven() -> None:
    problem = TransformerProblem.build(layers=1, mesh=(8,))
    with pytest.raises(InfeasibleProblem) as error:
        solve(replace(problem, capacity_bytes=1000), time_limit_s=10)
    assert error.value.bound_bytes is not None and error.value.bound_bytes > 1000
