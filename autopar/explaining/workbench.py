"""Solving again: a plan's model and settings, kept at hand for questions about what else could have been."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.explaining.attribution import Attribution
from autopar.mesh_search import SearchSettings
from autopar.pins import MESH_KEYS
from autopar.placements import Fold
from autopar.plan_types import Decisions, NodeDecision
from autopar.plans import Plan, PlanOptions
from autopar.rules import axis_rules
from autopar.trace import Trace

DEFAULT_AGAIN_S = 30.0  # for one question


@dataclass(frozen=True)
class Workbench:
    """What it takes to plan a traced model again.

    settings_of: the search's settings for given options.
    replan: searches with given settings and makes a plan of what it finds; raises Infeasible or PinError.
    from_text: whether the plan at hand was read from text, which does not say what rules cost.
    """

    trace: Trace
    settings_of: Callable[[PlanOptions], SearchSettings]
    replan: Callable[[PlanOptions, SearchSettings], Plan]
    from_text: bool = False

    def solve(self, options: PlanOptions, *, time_limit_s: float = DEFAULT_AGAIN_S, **conditions: Any) -> Plan:
        """The best plan under other options or other settings of the search (`fixed_mesh`, `forbidden`)."""
        settings = replace(self.settings_of(options), time_limit_s=time_limit_s, **conditions)
        return self.replan(options, settings)

    def whole(self, plan: Plan) -> Plan:
        """The plan with the rules of its ops as they are known here: a plan file leaves out their collectives."""
        if not self.from_text:
            return plan
        return replace(plan, decisions=with_known_rules(self.trace, plan.decisions, plan.mesh))

    def attribution(self, plan: Plan) -> Attribution:
        """Where the time of a plan for this model goes."""
        costs = CostModel(plan.cluster, plan.mesh)
        return Attribution(self.trace, plan.decisions, costs, OptimizerSpec(plan.options.optimizer))


def with_known_rules(trace: Trace, given: Decisions, mesh: tuple[int, ...]) -> Decisions:
    """Decisions that were read from text, with the collectives inside of ops, which text leaves out."""
    nodes, fold = {n.name: n for n in trace.graph_module.graph.nodes}, given.fold(trace.fold)
    return replace(given, nodes={n: _with_known_rules(nodes[n], d, mesh, fold) for n, d in given.nodes.items()})


def _with_known_rules(node: fx.Node, decision: NodeDecision, mesh: tuple[int, ...], fold: Fold | None) -> NodeDecision:
    rules = []
    for rule, size in zip(decision.rules, mesh, strict=True):
        said = (rule.inputs, rule.outputs, rule.lowering)
        known = (r for r in axis_rules(node, size, fold).rules if (r.inputs, r.outputs, r.lowering) == said)
        rules.append(next(known, rule))
    return replace(decision, rules=tuple(rules))


def with_pins(options: PlanOptions, pin: Mapping[str, Any]) -> PlanOptions:
    """The options with more pins. A new layout of the mesh takes the place of the old one."""
    old = dict(options.pin)
    if set(pin) & MESH_KEYS:
        old = {key: value for key, value in old.items() if key not in MESH_KEYS}
    new = {key: list(value) if isinstance(value, tuple) else value for key, value in pin.items()}
    return replace(options, pin={**old, **new})
