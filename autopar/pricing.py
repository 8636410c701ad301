"""Prices a plan from scratch: from its decisions alone, without the solver's matrices.

The sum must equal the solver's objective; the planner checks that after every solve.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.dataflow import (
    Dataflow,
    Operand,
    ViewMaps,
    gradient_values,
    is_backward,
    narrow_gradients,
    resolve,
    result_metas,
    value_name,
)
from autopar.grouping import grouped_values
from autopar.opcost import inner_steps, local_bytes, op_flops_of, op_seconds, work_share
from autopar.placements import State, replicated
from autopar.plan_types import Decisions, NodeDecision
from autopar.redistribute import Conversions, ConversionTables, step_s
from autopar.trace import Trace


@dataclass(frozen=True)
class Transfer:
    """One conversion that the program performs. `steps`: (kind, axis, bytes, seconds) each."""

    value: str
    phase: str
    source: State
    target: State
    steps: tuple[tuple[str, int, int, float], ...]

    @property
    def seconds(self) -> float:
        """Sum over the steps."""
        return sum(s for _, _, _, s in self.steps)


@dataclass(frozen=True)
class Offload:
    """One value that waits on the host: what it takes there, and the copies there and back."""

    value: str
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Price:
    """Seconds of one training step on one rank, by part, and what the parts are made of.

    inner: (kind, axis, bytes) of the collectives inside of ops, as often as they run; their seconds are the ops'.
    flops / recomputed_flops: of one rank.
    """

    forward_s: float
    backward_s: float
    recompute_s: float
    optimizer_s: float
    transfers: tuple[Transfer, ...]
    op_s: dict[str, float]
    flops: float
    recomputed_flops: float
    inner: tuple[tuple[str, int, int], ...] = ()
    offloads: tuple[Offload, ...] = ()

    @property
    def offload_s(self) -> float:
        """All copies to and from the host."""
        return sum(o.seconds for o in self.offloads)

    @property
    def host_bytes(self) -> int:
        """What waits on the host between the passes."""
        return sum(o.nbytes for o in self.offloads)

    @property
    def communication_s(self) -> float:
        """All conversions."""
        return sum(t.seconds for t in self.transfers)

    @property
    def step_time_s(self) -> float:
        """The whole step; nothing is assumed to overlap."""
        ops_s = self.forward_s + self.backward_s + self.recompute_s + self.optimizer_s
        return ops_s + self.communication_s + self.offload_s


def price(trace: Trace, decisions: Decisions, costs: CostModel, optimizer: OptimizerSpec) -> Price:
    """Price `decisions` for `trace` on the mesh of `costs`."""
    return _Pricer(trace, decisions, costs).price(optimizer)


class _Pricer:
    def __init__(self, trace: Trace, decisions: Decisions, costs: CostModel) -> None:
        self.trace, self.decisions, self.costs = trace, decisions, costs
        self.mesh = costs.mesh
        self.flow = Dataflow.of(trace)
        fold = decisions.fold(trace.fold)
        self.views = ViewMaps(self.mesh, fold)
        self.tables = ConversionTables(self.mesh, costs, fold)
        self.gradients = gradient_values(self.flow, trace.grads.values())
        self.narrow = narrow_gradients(self.flow, trace.grads.values())
        self.grouped = grouped_values(trace.graph_module.graph)
        self.nodes = {n.name: n for n in trace.graph_module.graph.nodes}
        self.param_of = {p.node: p.fqn for p in trace.params}

    def price(self, optimizer: OptimizerSpec) -> Price:
        op_s = {n.name: self._op_seconds(n, self.decisions.nodes[n.name]) for n in self.flow.ops}
        again = [n for n in self.flow.ops if self.decisions.nodes[n.name].recompute]
        shares = {n: op_flops_of(n) * work_share(self.decisions.nodes[n.name].rules, self.mesh) for n in self.flow.ops}
        return Price(
            forward_s=sum(op_s[n.name] for n in self.flow.ops if not is_backward(n)),
            backward_s=sum(op_s[n.name] for n in self.flow.ops if is_backward(n)),
            recompute_s=sum(op_s[n.name] for n in again),
            optimizer_s=self._optimizer_seconds(optimizer),
            transfers=tuple(self._transfers()),
            op_s=op_s,
            flops=sum(shares.values()),
            recomputed_flops=sum(shares[n] for n in again),
            inner=tuple(step for n in (*self.flow.ops, *again) for step in self._inner(n)),
            offloads=tuple(self._offloads()),
        )

    def _offloads(self) -> Iterator[Offload]:
        for node in self.flow.ops:
            for index, tensor in enumerate(result_metas(node)):
                if tensor is not None and value_name(node, index) in self.decisions.offloaded:
                    state = self.decisions.nodes[node.name].result_states[index]
                    assert state is not None
                    nbytes = local_bytes(tensor, state, self.mesh)
                    yield Offload(value_name(node, index), nbytes, self.costs.offload_s(nbytes))

    def _op_seconds(self, node: fx.Node, decision: NodeDecision) -> float:
        operands, states = self._seen(node)
        return op_seconds(self.costs, node, operands, decision.rules, states, decision.result_states)

    def _inner(self, node: fx.Node) -> list[tuple[str, int, int]]:
        decision = self.decisions.nodes[node.name]
        if not any(rule.collectives for rule in decision.rules):
            return []
        operands, states = self._seen(node)
        return inner_steps(node, operands, decision.rules, states, decision.result_states, self.mesh)

    def _seen(self, node: fx.Node) -> tuple[tuple[Operand, ...], list[State]]:
        """The operands of an op, and the states in which it sees them."""
        operands = self.flow.operands_of[node]
        decision = self.decisions.nodes[node.name]
        seen = [self.views.forward(o, s) for o, s in zip(operands, decision.operand_states, strict=True)]
        return operands, [s for s in seen if s is not None]

    def _optimizer_seconds(self, optimizer: OptimizerSpec) -> float:
        seconds = 0.0
        for param in self.trace.params:
            if param.fqn in self.trace.grads and optimizer.updates:
                tensor = result_metas(self.nodes[param.node])[0]
                assert tensor is not None
                nbytes = local_bytes(tensor, self.decisions.params[param.fqn], self.mesh)
                seconds += self.costs.optimizer_s(nbytes, optimizer.state_bytes(nbytes))
        return seconds

    def _made(self, operand: Operand) -> State:
        if operand.node.op == "placeholder":
            fqn = self.param_of.get(operand.node.name)
            return self.decisions.params[fqn] if fqn else replicated(len(self.mesh))
        state = self.decisions.nodes[operand.node.name].result_states[operand.index]
        assert state is not None
        return state

    def _wanted(self) -> Iterator[tuple[str, Operand, State]]:
        """(phase, operand, state) of every use, recomputed ones and gradients included."""
        for node in self.flow.ops:
            decision = self.decisions.nodes[node.name]
            for operand, state in zip(self.flow.operands_of[node], decision.operand_states, strict=True):
                yield ("backward" if is_backward(node) else "forward"), operand, state
                if decision.recompute:
                    yield "backward", operand, state
        for name, state in self.decisions.outputs.items():
            yield "forward", resolve(self.nodes[name]), state
        for fqn, name in self.trace.grads.items():
            operand = resolve(self.nodes[name])
            states = self._table(operand).states
            yield "backward", operand, self.views.preimages(operand, states)[self.decisions.params[fqn]]

    def _transfers(self) -> Iterator[Transfer]:
        seen: set[tuple[str, str, State]] = set()
        for phase, operand, target in self._wanted():
            source, key = self._made(operand), (phase, operand.value, target)
            if source == target or key in seen:
                continue
            seen.add(key)
            if phase == "backward" and (operand.value, target) in self.decisions.kept_copies:
                continue
            path = self._table(operand).path(source, target)
            costs = self.tables.costs(bucketed=operand.value in self.gradients)
            steps = tuple((s.kind, s.axis, s.nbytes, step_s(s, costs)) for s in path)
            yield Transfer(operand.value, phase, source, target, steps)

    def _table(self, operand: Operand) -> Conversions:
        return self.tables.of(
            operand.base_tensor,
            bucketed=operand.value in self.gradients,
            summable=operand.value not in self.narrow,
            grouped=operand.value in self.grouped,
        )
