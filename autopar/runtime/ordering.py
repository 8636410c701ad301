"""What a program returns beside its loss, in the order of the model's own rows.

Ranks that share a sequence may hold it dealt out (`autopar.dealing`), what comes of it as well. A training step drops
all but the loss; only where somebody asks for the rest is it put in order: half of a rank's part to one other rank
each, right before it is handed out.
"""

from __future__ import annotations

import torch
from torch import fx

from autopar.codegen.builder import GraphBuilder
from autopar.codegen.steps import emit_path
from autopar.cost.model import CostModel
from autopar.placements import State, in_order, is_dealt, local_shape
from autopar.plans import Plan
from autopar.redistribute import ConversionTables
from autopar.runtime.execute import RankProgram, bind_groups
from autopar.trace import Trace


class OutputOrder:
    """Of one program; what it takes is written when it is first asked for."""

    def __init__(self, trace: Trace, plan: Plan, states: dict[str, State]) -> None:
        self.trace, self.plan, self.states = trace, plan, states
        self._graphs: dict[str, fx.Graph] = {}
        self._modules: dict[tuple[str, tuple[str, ...]], fx.GraphModule] = {}

    def put(self, program: RankProgram, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, State]:
        """An output's part on this rank, by name, from end to end, and the state that this is."""
        state = self.states[name]
        if not any(map(is_dealt, state)):
            return tensor, state
        key = (name, program.group_names)
        if key not in self._modules:
            graph = bind_groups(self.written(name), program.group_names)
            self._modules[key] = fx.GraphModule(torch.nn.Module(), graph)
        return self._modules[key](*program.coordinates, tensor), in_order(state)

    def written(self, name: str) -> fx.Graph:
        """What puts an output in order, by name."""
        if name not in self._graphs:
            state, mesh = self.states[name], self.plan.mesh
            whole = next(n.meta["val"] for n in self.trace.graph_module.graph.nodes if n.name == name)
            costs, fold = CostModel(self.plan.cluster, mesh), self.plan.decisions.fold(self.trace.fold)
            builder = GraphBuilder(mesh, whole.fake_mode)
            part = builder.local_input(name, whole, local_shape(whole.shape, state, mesh) or ())
            path = ConversionTables(mesh, costs, fold).of(whole).path(state, in_order(state))
            builder.graph.output(emit_path(builder, part, path, keep_source_alive=True))
            self._graphs[name] = builder.graph
        return self._graphs[name]
