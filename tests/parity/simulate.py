"""A program on simulated ranks against the eager model: losses, gradients, and the state after five AdamW steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import autopar
import autopar.api
from autopar._torch_compat import local_parts, local_tensor
from autopar.placements import State, local_shape
from autopar.plans import Plan
from autopar.sample import sample_values
from autopar.trace import Trace, trace
from autopar.tracing.capture import find_loss
from autopar.verification import (
    Simulation,
    cut,
    emit_for,
    glue,
    gradient_errors,
    match_collectives,
    relative_error,
    simulated_ranks,
)
from tests.widen import WidenCasts, widened

TOLERANCE = 1e-9
STEPS, LR = 5, 1e-2
ROUNDING = 1e-13  # of float64 sums whose terms are about 1


def adamw(params: Iterable[torch.Tensor]) -> torch.optim.AdamW:
    """AdamW for which gradients that are rounding errors are 0.

    It divides a gradient by its own size: one that is zero but for rounding (of a bias before a batch norm, or of the
    keys of attention) would make full steps in the direction of rounding errors, on one device as on many.
    """
    optimizer = torch.optim.AdamW(params, lr=LR)

    def quiet(*_: Any) -> None:
        for param in optimizer.param_groups[0]["params"]:
            if param.grad is not None:
                grad = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
                grad.masked_fill_(grad.abs() < ROUNDING, 0.0)

    optimizer.register_step_pre_hook(quiet)
    return optimizer


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
    buffers: dict[str, torch.Tensor]


def make_case(model: nn.Module, call: Any) -> Case:
    """Trace a model, and train a copy of it."""
    traced = widened(trace(model, call))
    values = {k: v.clone() for k, v in sample_values(traced, model, call, seed=0).items()}
    eager = copy.deepcopy(model)
    optimizer = adamw(eager.parameters())
    losses, grads = [], {}
    with WidenCasts():
        for _ in range(STEPS):
            loss = find_loss(eager(*call[0], **call[1]))
            loss.backward()
            losses.append(loss.detach())
            grads = grads or {n: p.grad.clone() for n, p in eager.named_parameters() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
    params = {n: p.detach() for n, p in eager.named_parameters()}
    buffers = {n: b for n, b in eager.named_buffers() if n in traced.buffer_updates}
    return Case(model, call, traced, values, losses, grads, params, buffers)


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
        self.optimizers = [adamw(p.values()) for p in self.params]

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


@dataclass(frozen=True)
class Trained:
    """Losses of five steps, gradients of the first, parameters and updated buffers after the last."""

    losses: list[torch.Tensor]
    grads: dict[str, torch.Tensor]
    params: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def train(of: Case, plan: Plan) -> Trained:
    """Five steps of the emitted program."""
    emitted = emit_for(of.traced, plan)
    match_collectives([emitted] * math.prod(plan.mesh), plan.mesh)
    losses, first = [], {}
    buffer_nodes = {b.fqn: b.node for b in of.traced.buffers}
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
            made = dict(zip(emitted.output_names, outputs, strict=False))
            others |= {buffer_nodes[fqn]: made[node] for fqn, node in of.traced.buffer_updates.items()}
            named = dict(zip(emitted.grads, grads, strict=True))
            first = first or {f: simulation.gather(g, simulation.param_states[f]) for f, g in named.items()}
            ranks.update(named)
        whole = ("R",) * len(plan.mesh)
        buffers = {fqn: simulation.gather(others[buffer_nodes[fqn]], whole) for fqn in of.traced.buffer_updates}
        return Trained(losses, first, ranks.whole(), buffers)


def assert_equal_to_eager(of: Case, plan: Plan, tolerance: float = TOLERANCE) -> None:
    """Loss of all steps, all gradients, all parameters and buffers."""
    trained = train(of, plan)
    for step, (found, expected) in enumerate(zip(trained.losses, of.losses, strict=True)):
        assert relative_error(found, expected) <= tolerance, f"loss of step {step}"
    assert trained.grads.keys() == of.grads.keys()
    for found, expected in ((trained.grads, of.grads), (trained.params, of.params)):
        errors = gradient_errors(found, {k: expected[k] for k in found})
        worst = max(errors, key=lambda k: errors[k])
        assert errors[worst] <= tolerance, f"{worst} is off by {errors[worst]:.1e}"
    for fqn, buffer in trained.buffers.items():
        assert relative_error(buffer, of.buffers[fqn]) <= tolerance, f"buffer {fqn}"


def mixed(traced: Trace, mesh: tuple[int, ...]) -> dict[str, State]:
    """A storage for every parameter, by turns: cut along one dim or the other, on one axis or all, or nowhere.

    A parameter whose dims do not divide so stays whole where they don't.
    """
    turns = [("S(0)", "S(1)"), ("R", "S(0)"), ("S(1)", "S(1)"), ("S(0)", "R"), ("R", "R")]
    found = {}
    for index, param in enumerate(traced.params):
        state: list[str] = []
        for placement in turns[index % len(turns)][-len(mesh) :]:
            wanted = (*state, "R" if placement == "S(1)" and len(param.shape) < 2 else placement)
            fits = local_shape(param.shape, wanted, mesh[: len(wanted)]) is not None
            state.append(wanted[-1] if fits else "R")
        found[param.fqn] = tuple(state)
    return found
