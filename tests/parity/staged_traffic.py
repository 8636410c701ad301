"""What the stages of a program send, beside what its plan pays for."""

from __future__ import annotations

from collections import Counter

import torch

from autopar.codegen.stage_types import StageProgram
from autopar.codegen.traffic import graph_traffic
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.dataflow import resolve
from autopar.explaining.workbench import with_known_rules
from autopar.pricing import price
from autopar.runtime.make_stages import StagedProgram
from autopar.staged import StagedPlan
from autopar.staging import stage_cluster
from autopar.traffic import Traffic, planned_traffic


def assert_sends_what_is_paid_for(plan: StagedPlan, made: StagedProgram, *, alike: bool) -> None:
    """All collectives of all stages, exactly; and no more between stages than was priced.

    alike: the same goes from any block to the next, and this was priced exactly.
    """
    costs = CostModel(stage_cluster(plan), made.program.mesh)
    decisions = with_known_rules(made.trace, made.decisions, costs.mesh)  # ranks hand each other plans as text
    priced = price(made.trace, decisions, costs, OptimizerSpec("adamw"))
    planned = planned_traffic(priced, costs.mesh, _times(made))
    emitted: Traffic = Counter()
    for stage in made.program.stages:
        emitted += _traffic(stage)
    exchanges = costs.scatters_by_exchange
    assert _by_axis(emitted, exchanges) == _by_axis(planned, exchanges) and sum(planned.values()) > 0
    _assert_messages(plan, made, alike)


def _times(made: StagedProgram) -> dict[str, int]:
    """How many stages convert a parameter or its gradient: those that use it."""
    nodes, found = {n.name: n for n in made.trace.graph_module.graph.nodes}, {}
    for param in made.trace.params:
        found[param.node] = max(1, sum(param.fqn in s.params for s in made.program.stages))
        if param.fqn in made.trace.grads:
            gradient = resolve(nodes[made.trace.grads[param.fqn]]).value
            found[gradient] = sum(param.fqn in (*s.grads_early, *s.grads_late) for s in made.program.stages)
    return found


def _traffic(stage: StageProgram) -> Traffic:
    graphs = [stage.forward.graph, stage.backward.graph, stage.weights.graph, stage.reduce]
    graphs += [] if stage.gather is None else [stage.gather.graph]
    return sum((graph_traffic(graph, stage.mesh) for graph in graphs), Counter())


def _by_axis(traffic: Traffic, scatters_by_exchange: bool) -> Traffic:
    """On CPUs a reduce-scatter is an exchange of as many bytes, and a sum."""
    found: Traffic = Counter()
    for (kind, axis), nbytes in traffic.items():
        found["all_to_all" if scatters_by_exchange and kind == "reduce_scatter" else kind, axis] += nbytes
    return found


def _assert_messages(plan: StagedPlan, made: StagedProgram, alike: bool) -> None:
    assert plan.predictor is not None
    jobs = plan.predictor.jobs(plan.named)
    job = jobs[0]
    paid = max(round(float(one.table.boundary @ one.weights)) for one in jobs)
    item = getattr(torch, job.table.dtype).itemsize
    sent = [message for s in made.program.stages for message in (s.sends_forward, s.sends_backward) if message.values]
    found = {sum(t.numel() * item for t in message.tensors) for message in sent}
    alike = alike and plan.named.shapes is None
    unlike = (
        1 if plan.named.shapes is None else max(one.layout.tp for one in jobs)
    )  # the other stage may cut it smaller
    assert found and max(found) <= paid * unlike, f"{found} bytes, paid for {paid}"
    assert not alike or found == {paid}, f"messages of {found} bytes, paid for {paid}"
