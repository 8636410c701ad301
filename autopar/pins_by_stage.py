"""Pins of a pipeline whose stages have meshes of different shape: one mesh for all, whose axes mean what a stage says.

A stage with 2 data and 2 tensor ranks beside one with 4 data ranks are both meshes of 2 x 2: the first cuts weights on
the inner axis, the second cuts samples on it, too. What goes from one to the other is converted as between any two ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from autopar.pins import PinRequest, resolve_pins
from autopar.placements import State
from autopar.sharding import OpOption, Pins
from autopar.trace import ParamInfo, Trace

Roles = tuple[str, ...]


@dataclass(frozen=True)
class StageRoles:
    """roles: of every stage, one of "dp", "cp", "tp" for each axis of the mesh that all stages share.

    of: the stage of every op of the joint graph, None for what every stage computes that needs it; of a parameter, by
        its placeholder, the first that takes it, which stores it.
    """

    roles: tuple[Roles, ...]
    of: Mapping[str, int | None]

    def kind(self, node: str) -> Roles:
        """What the axes are for where an op runs: identical layers are decided alike where these are the same."""
        stage = self.of.get(node)
        return () if stage is None else self.roles[stage]

    @staticmethod
    def of_ops(trace: Trace, roles: tuple[Roles, ...], of: Mapping[str, int | None]) -> StageRoles:
        """With the stages of parameters. of: of ops alone."""
        nodes = {n.name: n for n in trace.graph_module.graph.nodes if n.op == "placeholder"}
        params = {p.node: min(_takers(nodes[p.node], of), default=0) for p in trace.params}
        return StageRoles(roles, {**of, **params})


def _takers(node: fx.Node, of: Mapping[str, int | None]) -> set[int]:
    found: set[int] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        stage = of.get(user.name)
        if stage is not None:
            found.add(stage)
        else:  # a view or a cast, which every stage makes for itself
            stack += user.users
    return found


def pins_by_stage(request: PinRequest, trace: Trace, mesh: tuple[int, ...], stages: StageRoles) -> Pins:
    """The filters of a request, on the ops and parameters of each stage with the roles that the axes have there."""
    known = {roles: resolve_pins(replace(request, roles=roles), trace, mesh) for roles in {*stages.roles}}
    of_stage = [known[roles] for roles in stages.roles]

    def pins_of(node: fx.Node) -> Pins:
        stage = stages.of.get(node.name)
        return Pins() if stage is None else of_stage[stage]

    def allow(node: fx.Node, option: OpOption) -> bool:
        allowed = pins_of(node).allow_option
        return allowed is None or allowed(node, option)

    def allow_param(param: ParamInfo, state: State) -> bool:
        allowed = of_stage[stages.of[param.node] or 0].allow_param
        return allowed is None or allowed(param, state)

    def avoid(node: fx.Node, option: OpOption) -> bool:
        return any(one(node, option) for one in pins_of(node).avoid_options)

    def fleeting(node: fx.Node, state: State) -> bool:
        found = pins_of(node).fleeting
        return found is not None and found(node, state)

    return Pins(allow, (avoid,), allow_param, of_stage[0].recompute, fleeting, stages.kind)
