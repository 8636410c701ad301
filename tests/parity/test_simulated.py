"""Every rank simulated, against the eager model: loss, gradients, and parameters after five AdamW steps."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import autopar
import autopar.api
from autopar._torch_compat import local_parts, local_tensor
from autopar.errors import Infeasible
from autopar.pins import weight_slots
from autopar.placements import State, shard_dim
from autopar.plans import Plan
from autopar.sample import sample_values
from autopar.trace import Trace, trace
from autopar.verification import (
    Simulation,
    cut,
    emit_for,
    glue,
    gradient_errors,
    match_collectives,
    relative_error,
    run_reference,
    simulated_ranks,
)
from tests.models import ModelAndInputs, tiny_bert, tiny_llama, tiny_mlp
from tests.widen import WidenCasts, widened

TOLERANCE = 1e-9
STEPS, LR = 5, 1e-2
MESHES = [(2,), (4,), (2, 2), (2, 4)]
MODELS: dict[str, Callable[[], ModelAndInputs]] = {
    "llama": lambda: tiny_llama(layers=1),
    "bert": lambda: tiny_bert(layers=1),
    "mlp": tiny_mlp,
}
everywhere = pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "x".join(map(str, m)))
every_model = pytest.mark.parametrize("name", MODELS)


@dataclass(frozen=True)
class Case:
    """A model, its widened trace, values of its placeholders, and five eager steps: losses, grads, params."""

    model: nn.Module
    call: Any
    traced: Trace
    values: dict[str, torch.Tensor]
    losses: list[torch.Tensor]
    grads: dict[str, torch.Tensor]
    params: dict[str, torch.Tensor]


@cache
def case(name: str) -> Case:
    """Traced and trained once for all tests."""
    model, call = MODELS[name]()
    traced = widened(trace(model, call))
    values = {k: v.clone() for k, v in sample_values(traced, model, call, seed=0).items()}
    eager = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(eager.parameters(), lr=LR)
    losses, grads = [], {}
    with WidenCasts():
        for _ in range(STEPS):
            loss = eager(*call[0], **call[1])["loss"]
            loss.backward()
            losses.append(loss.detach())
            grads = grads or {n: p.grad.clone() for n, p in eager.named_parameters() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
    return Case(model, call, traced, values, losses, grads, {n: p.detach() for n, p in eager.named_parameters()})


def cluster(mesh: tuple[int, ...]) -> autopar.ClusterSpec:
    """Slow devices with fast links between them, so that cutting even a tiny model pays."""
    spec = autopar.ClusterSpec.preset("h100-sxm", gpus=math.prod(mesh))
    rates = (("float32", 1e9), ("float64", 1e9))
    device = replace(
        spec.device, peak_flops_per_s=rates, memory_bytes_per_s=1e9, launch_overhead_s=1e-9, matmul_ramp_s=0.0
    )
    links = tuple(replace(link, bytes_per_s=1e13, latency_s=1e-9) for link in spec.links)
    return replace(spec, device=device, links=links, collective_launch_s=0.0)


def planned(of: Case, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Plan:
    """The plan for a case, on its widened trace."""
    monkeypatch.setattr(autopar.api, "trace", lambda model, call: of.traced)
    pin = options.pop("pin", {"mesh": list(mesh)})
    plan = autopar.plan(of.model, cluster(mesh), example_inputs=of.call, pin=pin, **options)
    assert plan.mesh == mesh
    return plan


# -- comparing -----------------------------------------------------------------------------


class Ranks:
    """The parameters of all simulated ranks, each rank with an optimizer of its own."""

    def __init__(self, simulation: Simulation, values: Mapping[str, torch.Tensor]) -> None:
        self.simulation, self.mesh = simulation, simulation.mesh
        self.nodes = {p.fqn: p.node for p in simulation.traced.params}
        self.params: list[dict[str, nn.Parameter]] = []
        for rank in range(simulation.ranks):
            parts = {f: cut(values[n], simulation.states[n], self.mesh, rank) for f, n in self.nodes.items()}
            self.params.append({fqn: nn.Parameter(part.clone()) for fqn, part in parts.items()})
        self.optimizers = [torch.optim.AdamW(list(p.values()), lr=LR) for p in self.params]

    def local(self) -> dict[str, torch.Tensor]:
        """The parameters by placeholder, as simulated tensors."""
        return {
            node: local_tensor({r: params[fqn].detach() for r, params in enumerate(self.params)})
            for fqn, node in self.nodes.items()
        }

    def update(self, grads: Mapping[str, torch.Tensor]) -> None:
        """One optimizer step on every rank."""
        for fqn, grad in grads.items():
            parts = local_parts(grad)
            assert parts is not None
            for rank, params in enumerate(self.params):
                params[fqn].grad = parts[rank].clone()
        for optimizer in self.optimizers:
            optimizer.step()

    def whole(self) -> dict[str, torch.Tensor]:
        """The whole parameters."""
        states = self.simulation.param_states
        return {f: glue([p[f].detach() for p in self.params], states[f], self.mesh) for f in self.nodes}


def train(of: Case, plan: Plan) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Five steps of the emitted program: losses, gradients of the first step, parameters after the last."""
    emitted = emit_for(of.traced, plan)
    match_collectives([emitted] * math.prod(plan.mesh), plan.mesh)
    losses, first = [], {}
    with simulated_ranks(plan.mesh) as (groups, coordinates):
        simulation = Simulation(of.traced, plan.decisions, emitted, groups, coordinates)
        ranks = Ranks(simulation, of.values)
        others = {k: simulation.scatter(k, v) for k, v in of.values.items() if k not in simulation.states}
        for _ in range(STEPS):
            local = {**others, **ranks.local()}
            with torch.no_grad():
                outputs, saved = simulation.program.forward(local)
                grads = simulation.program.backward(saved, local)
            losses.append(simulation.gather(outputs[0], ("R",) * len(plan.mesh)))
            named = dict(zip(emitted.grads, grads, strict=True))
            first = first or {f: simulation.gather(g, simulation.param_states[f]) for f, g in named.items()}
            ranks.update(named)
        params = ranks.whole()
    return losses, first, params


def assert_equal_to_eager(of: Case, plan: Plan, tolerance: float = TOLERANCE) -> None:
    """Loss of all steps, all gradients, all parameters."""
    losses, grads, params = train(of, plan)
    for step, (found, expected) in enumerate(zip(losses, of.losses, strict=True)):
        assert relative_error(found, expected) <= tolerance, f"loss of step {step}"
    assert grads.keys() == of.grads.keys()
    for found, expected in ((grads, of.grads), (params, of.params)):
        errors = gradient_errors(found, {k: expected[k] for k in found})
        worst = max(errors, key=lambda k: errors[k])
        assert errors[worst] <= tolerance, f"{worst} is off by {errors[worst]:.1e}"


# -- the plans -----------------------------------------------------------------------------


@every_model
@everywhere
def test_free_plan(name: str, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(name)
    plan = planned(of, mesh, monkeypatch)
    for node, states in weight_uses(of.traced, plan):
        assert any(shard_dim(p) is not None for state in states for p in state), f"{node} is not cut at all"
    assert_equal_to_eager(of, plan)


@every_model
@everywhere
def test_tensor_parallel(name: str, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(name)
    pin = {"tp": mesh[-1]} if len(mesh) == 1 else {"dp": mesh[0], "tp": mesh[1]}
    plan = planned(of, mesh, monkeypatch, pin=pin)
    slots = {n.name: weight_slots(n, of.traced) for n in of.traced.graph_module.graph.nodes if n.op == "call_function"}
    for node, states in weight_uses(of.traced, plan):
        for slot in slots[node]:
            assert shard_dim(states[slot][-1]) is not None, f"{node} uses a whole weight"
    assert_equal_to_eager(of, plan)


@every_model
@everywhere
def test_mixed_sharding(name: str, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(name)
    pins = mixed(of.traced, mesh)
    plan = planned(of, mesh, monkeypatch, pin={"mesh": list(mesh), **pins})
    assert plan.decisions.params == pins
    assert_equal_to_eager(of, plan)


def tight_cases() -> Iterator[Any]:
    """All models on all meshes; finding the least memory takes long but for the smallest."""
    for name, mesh in itertools.product(MODELS, MESHES):
        quick = name == "mlp" and len(mesh) == 1
        marks = () if quick else (pytest.mark.slow,)
        yield pytest.param(name, mesh, marks=marks, id=f"{name}-{'x'.join(map(str, mesh))}")


@pytest.mark.parametrize(("name", "mesh"), list(tight_cases()))
def test_tightest_memory_limit(name: str, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(name)
    with pytest.raises(Infeasible) as error:
        planned(of, mesh, monkeypatch, memory_limit_bytes=1)
    needed = error.value.needed_bytes
    assert needed is not None
    plan = planned(of, mesh, monkeypatch, memory_limit_bytes=needed)
    assert plan.predicted["peak_bytes"] <= needed
    assert_equal_to_eager(of, plan)


def weight_uses(traced: Trace, plan: Plan) -> Iterator[tuple[str, tuple[State, ...]]]:
    """(node, operand states) of every matrix product or lookup that uses a weight."""
    for node in traced.graph_module.graph.nodes:
        if node.op == "call_function" and weight_slots(node, traced):
            yield node.name, plan.decisions.nodes[node.name].operand_states


def mixed(traced: Trace, mesh: tuple[int, ...]) -> dict[str, State]:
    """A storage for every parameter, by turns: cut along one dim or the other, on one axis or all, or nowhere."""
    turns = [("S(0)", "S(1)"), ("R", "S(0)"), ("S(1)", "S(1)"), ("S(0)", "R"), ("R", "R")]
    found = {}
    for index, param in enumerate(traced.params):
        state = turns[index % len(turns)][-len(mesh) :]
        rank = len(param.shape)
        found[param.fqn] = tuple("R" if p == "S(1)" and rank < 2 else p for p in state)
    return found


# -- the widening itself -------------------------------------------------------------------


@every_model
def test_widened_trace_is_the_widened_eager_model(name: str) -> None:
    of = case(name)
    values = run_reference(of.traced, of.values)
    assert relative_error(values[of.traced.loss], of.losses[0]) <= 1e-12
    errors = gradient_errors({f: values[n] for f, n in of.traced.grads.items()}, of.grads)
    assert max(errors.values()) <= 1e-12
    narrow = [n.name for n in of.traced.graph_module.graph.nodes if _dtype(n) == torch.float32]
    assert not narrow


def test_unmodified_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its casts to float32 left in place, Llama agrees as far as float32 does."""
    model, call = MODELS["llama"]()
    traced = trace(model, call)
    assert any(_dtype(n) == torch.float32 for n in traced.graph_module.graph.nodes)
    loss = model(**call[1])["loss"]
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    of = Case(model, call, traced, sample_values(traced, model, call, seed=0), [], {}, {})
    plan = planned(of, (2, 2), monkeypatch, pin={"dp": 2, "tp": 2})
    losses, found, _ = train(of, plan)
    assert relative_error(losses[0], loss.detach()) <= 2e-6
    assert max(gradient_errors(found, grads).values()) <= 2e-6


def _dtype(node: torch.fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None
