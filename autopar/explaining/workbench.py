"""Solving again: a plan's model and settings, kept at hand for questions about what else could have been."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.explaining.attribution import Attribution
from autopar.pins import MESH_KEYS
from autopar.planning import SearchSettings
from autopar.plans import Plan, PlanOptions
from autopar.trace import Trace

DEFAULT_AGAIN_S = 30.0  # for one question


@dataclass(frozen=True)
class Workbench:
    """What it takes to plan a traced model again.

    settings_of: the search's settings for given options.
    replan: searches with given settings and makes a plan of what it finds; raises Infeasible or PinError.
    """

    trace: Trace
    settings_of: Callable[[PlanOptions], SearchSettings]
    replan: Callable[[PlanOptions, SearchSettings], Plan]

    def solve(self, options: PlanOptions, *, time_limit_s: float = DEFAULT_AGAIN_S, **conditions: Any) -> Plan:
        """The best plan under other options or other settings of the search (`fixed_mesh`, `forbidden`)."""
        settings = replace(self.settings_of(options), time_limit_s=time_limit_s, **conditions)
        return self.replan(options, settings)

    def attribution(self, plan: Plan) -> Attribution:
        """Where the time of a plan for this model goes."""
        costs = CostModel(plan.cluster, plan.mesh)
        return Attribution(self.trace, plan.decisions, costs, OptimizerSpec(plan.options.optimizer))


def with_pins(options: PlanOptions, pin: Mapping[str, Any]) -> PlanOptions:
    """The options with more pins. A new layout of the mesh takes the place of the old one."""
    old = dict(options.pin)
    if set(pin) & MESH_KEYS:
        old = {key: value for key, value in old.items() if key not in MESH_KEYS}
    new = {key: list(value) if isinstance(value, tuple) else value for key, value in pin.items()}
    return replace(options, pin={**old, **new})
