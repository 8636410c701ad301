"""The two parts of a stage's backward pass: what the stage before waits for, and what nobody waits for."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable

import torch
from torch import fx

from autopar.codegen.stage_demand import Demands, Side, Value, follows


class Split:
    """What each part computes.

    sends: to the stage before. early / late: gradients of the first and of the second part.
    early_nodes / late_nodes: what is computed. carried: what the second part takes of the first, or of what came from
    the stage behind.
    """

    def __init__(self, demands: Demands, at: int) -> None:
        self.demands, self.at = demands, at
        demand = demands.stages[at]
        self.sends = list(demands.stages[at - 1].received_backward) if at else []
        gradients = {fqn: Value(Side.BACKWARD, node) for fqn, node in demand.gradients.items()}
        self.early_nodes, _ = self._reach(self.sends, ())
        for node in demand.backward:  # all results of an op, though nobody may wait for some
            if node.target is operator.getitem and node.all_input_nodes[0] in self.early_nodes:
                self.early_nodes[node] = None
        self.early = {fqn: value for fqn, value in gradients.items() if value.node in self.early_nodes}
        self.late = {fqn: value for fqn, value in gradients.items() if fqn not in self.early}
        self.late_nodes, self.carried = self._reach(self.late.values(), self.early_nodes)

    def _reach(
        self, values: Iterable[Value], before: Container[fx.Node]
    ) -> tuple[dict[fx.Node, None], dict[Value, None]]:
        """(nodes to be computed for `values`, what they take of the nodes `before` and of received values)."""
        found: dict[fx.Node, None] = {}
        carried: dict[Value, None] = {}
        stack = [v.node for v in values if v.side is Side.BACKWARD]
        while stack:
            node = stack.pop()
            source = self.demands.source(self.at, node)
            if source is False or node in found:
                continue
            if isinstance(source, Value):
                if source in self.demands.stages[self.at].received_backward:
                    carried[source] = None
            elif node in before and isinstance(node.meta["val"], torch.Tensor) and not follows(node):
                carried[Value(Side.BACKWARD, node)] = None
            else:
                found[node] = None
                stack += node.all_input_nodes
        return found, carried
