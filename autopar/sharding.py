"""From a trace, op rules and costs to the solver's problem, and back from its solution.

Every real op of the joint graph becomes an `Op`. Its choices are the combinations of one
rule per mesh axis that divide evenly; each takes its operands' base values in certain
states. Besides them there are ops for placeholders (a parameter's choices are the states
in which it may be stored, together with its gradient and optimizer state), one `grad:`
op per gradient (tied to its parameter) and one `output:` op per output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.dataflow import (
    Dataflow,
    Operand,
    ValueName,
    ViewMaps,
    gradient_values,
    gradients_by_node,
    is_backward,
    narrow_gradients,
    outputs_by_value,
    result_metas,
    value_name,
)
from autopar.errors import PinError
from autopar.grouping import grouped_values
from autopar.opcost import op_seconds
from autopar.placements import State, can_be_held, can_be_put_in_order, replicated
from autopar.plan_types import Decisions, NodeDecision
from autopar.redistribute import ConversionTables
from autopar.rules import AxisRule, axis_rules, compatible
from autopar.segments import must_rerun, recompute_times
from autopar.solver import Choice, Op, Problem, Solution, Value
from autopar.trace import ParamInfo, Trace
from autopar.waiting import Waiting

ChoiceFilter = Callable[[fx.Node, "OpOption"], bool]


@dataclass(frozen=True)
class OpOption:
    """One choice of a real op, in terms of placements.

    operand_states: as the op sees them; base_states: the same, in terms of the base values.
    """

    rules: tuple[AxisRule, ...]
    operand_states: tuple[State, ...]
    base_states: tuple[State, ...]
    result_states: tuple[State | None, ...]


@dataclass(frozen=True)
class Pins:
    """What the user fixed, resolved: filters on options of ops, on parameter states, on recomputation.

    An op of which a filter leaves nothing is not filtered by it.
    """

    allow_option: ChoiceFilter | None = None
    avoid_options: tuple[ChoiceFilter, ...] = ()  # of the options that are allowed, those not to take
    allow_param: Callable[[ParamInfo, State], bool] | None = None
    recompute: Callable[[fx.Node], str | None] | None = None  # "keep", "recompute", "offload" or None
    fleeting: Callable[[fx.Node, State], bool] | None = None  # whether copies of results in a state never wait
    kind: Callable[[str], object] | None = None  # of an op, by name: those of unlike kinds are no twins


@dataclass(frozen=True)
class ShardingProblem:
    """The solver's problem with what is needed to read its solution.

    options: per op index, its options (aligned with the op's choices) for real ops.
    unruled: names of ops that only run replicated for want of a rule.
    """

    problem: Problem
    mesh: tuple[int, ...]
    op_index: dict[str, int]
    value_index: dict[ValueName, int]
    states: tuple[tuple[State, ...], ...]
    options: dict[str, tuple[OpOption, ...]]
    param_states: dict[str, tuple[State, ...]]
    output_states: dict[str, tuple[State, ...]]
    unruled: tuple[str, ...] = ()

    def decisions(self, solution: Solution) -> Decisions:
        """What the solution says, in terms of graph nodes and placements."""
        names = {i: v for v, i in self.value_index.items()}
        nodes = {}
        for name, options in self.options.items():
            index = self.op_index[name]
            option = options[solution.choices[index]]
            recompute = index in solution.recomputed
            nodes[name] = NodeDecision(option.rules, option.base_states, option.result_states, recompute)
        params = {
            fqn: states[solution.choices[self.op_index[f"param:{fqn}"]]] for fqn, states in self.param_states.items()
        }
        at = {name: solution.choices[self.op_index[f"output:{name}"]] for name in self.output_states}
        outputs = {name: states[at[name]] for name, states in self.output_states.items()}
        kept = frozenset(names[v] for v in solution.kept)
        copies = frozenset((names[v], self.states[v][s]) for v, s in solution.kept_copies)
        return Decisions(nodes, params, outputs, kept, copies, frozenset(names[v] for v in solution.offloaded))


def build_problem(
    trace: Trace,
    costs: CostModel,
    optimizer: OptimizerSpec,
    *,
    capacity_bytes: int | None = None,
    pins: Pins | None = None,
    views: ViewMaps | None = None,
) -> ShardingProblem:
    """State the planning problem of `trace` on the mesh of `costs`. views: how states travel through views.

    Dims that hold batch and sequence are cut run by run only if the views say so (`ViewMaps.fold`).
    """
    return _Builder(trace, costs, optimizer, pins or Pins(), views or ViewMaps(costs.mesh)).build(capacity_bytes)


class _Builder:
    def __init__(self, trace: Trace, costs: CostModel, optimizer: OptimizerSpec, pins: Pins, views: ViewMaps) -> None:
        self.trace, self.costs, self.optimizer, self.pins = trace, costs, optimizer, pins
        self.mesh, self.flow = costs.mesh, Dataflow.of(trace)
        self.views = views
        self.ops: list[Op] = []
        self.values: list[Value] = []
        self.states: list[tuple[State, ...]] = []
        self.op_index: dict[str, int] = {}
        self.value_index: dict[ValueName, int] = {}
        self.options: dict[str, tuple[OpOption, ...]] = {}
        self.param_states: dict[str, tuple[State, ...]] = {}
        self.output_states: dict[str, tuple[State, ...]] = {}
        self.unruled: list[str] = []
        self._offers: dict[object, tuple[list[tuple[State, ...]], tuple[OpOption, ...], tuple[Choice, ...]]] = {}
        self.tables = ConversionTables(self.mesh, costs, views.fold)
        self.gradients = gradient_values(self.flow, trace.grads.values())
        self.narrow = narrow_gradients(self.flow, trace.grads.values())
        self.grouped = grouped_values(trace.graph_module.graph)
        self._gradient_operands: dict[str, Operand] = {}
        self.constant_bytes = 0
        self._stored: dict[tuple[object, ...], tuple[Choice, ...]] = {}
        self._waiting = Waiting(costs, self.pins.recompute, self.pins.fleeting)
        self._known_preimages: dict[tuple[object, ...], dict[State, State]] = {}

    # -- the whole ---------------------------------------------------------------

    def build(self, capacity_bytes: int | None) -> ShardingProblem:
        grads_of = gradients_by_node(self.trace)
        output_values = outputs_by_value(self.trace)
        self._gradient_operands = {p.fqn: o for found in grads_of.values() for p, o in found}
        self._add_placeholders()
        forward_done = False
        forward_ops = 0
        for node in self.flow.ops:
            if is_backward(node) and not forward_done:
                self._add_outputs(output_values)
                forward_ops, forward_done = len(self.ops), True
            self._add_real_op(node)
            for param, operand in grads_of.get(node, ()):
                self._add_gradient(param, operand)
        if not forward_done:
            self._add_outputs(output_values)
            forward_ops = len(self.ops)
        for param, operand in grads_of.get(None, ()):
            self._add_gradient(param, operand)
        problem = Problem(
            ops=tuple(self._with_recompute_times(forward_ops)),
            values=tuple(self.values),
            forward_ops=forward_ops,
            capacity_bytes=capacity_bytes,
            constant_bytes=self.constant_bytes,
            host_capacity_bytes=self.costs.host_bytes,
        )
        return ShardingProblem(
            problem,
            self.mesh,
            self.op_index,
            self.value_index,
            tuple(self.states),
            self.options,
            self.param_states,
            self.output_states,
            tuple(self.unruled),
        )

    # -- values ------------------------------------------------------------------

    def _add_value(self, name: ValueName, tensor: torch.Tensor, *, always: bool = False, live_out: bool = False) -> int:
        kind = (name in self.gradients, name not in self.narrow, name in self.grouped)
        table = self.tables.of(tensor, bucketed=kind[0], summable=kind[1], grouped=kind[2])
        self.value_index[name] = index = len(self.values)
        self.values.append(Value(name, table.state_bytes, table.cost_s, always, live_out, table.workspace_bytes))
        self.states.append(table.states)
        return index

    def _preimages(self, operand: Operand, states: tuple[State, ...]) -> dict[State, State]:
        """`ViewMaps.preimages`, found once for identical layers."""
        views = tuple((self.trace.twins.get(v.node.name, v.node.name), v.index) for v in operand.views)
        key = (views, id(states))
        if key not in self._known_preimages:
            self._known_preimages[key] = self.views.preimages(operand, states)
        return self._known_preimages[key]

    def _add_op(self, op: Op) -> int:
        self.op_index[op.name] = len(self.ops)
        self.ops.append(op)
        return len(self.ops) - 1

    # -- placeholders ------------------------------------------------------------

    def _add_placeholders(self) -> None:
        params = {p.node: p for p in self.trace.params}
        for node in self.flow.placeholders:
            tensor = result_metas(node)[0]
            assert tensor is not None
            value = self._add_value(node.name, tensor, always=True)
            if node.name in params:
                self._add_param(params[node.name], tensor, value)
                continue
            whole = self.states[value].index(replicated(len(self.mesh)))
            self.constant_bytes += self.values[value].state_bytes[whole]
            self._add_op(Op(f"input:{node.name}", (), (value,), (Choice(0.0, (), (whole,)),)))

    def _add_param(self, param: ParamInfo, tensor: torch.Tensor, value: int) -> None:
        stored = [s for s in self.states[value] if can_be_held(s)]
        if param.fqn in self._gradient_operands:
            gradient = self._gradient_operands[param.fqn]
            possible = self._preimages(gradient, self.tables.of(gradient.base_tensor).states)
            stored = [s for s in stored if s in possible]
        if self.pins.allow_param is not None:
            possible_states, stored = stored, [s for s in stored if self.pins.allow_param(param, s)]
            if not stored:
                raise PinError(_no_state_left(param, self.mesh, possible_states))
        optimized = param.fqn in self.trace.grads and self.optimizer.updates
        self.param_states[param.fqn] = tuple(stored)
        key = ("param", id(self.values[value].state_bytes), optimized, tuple(stored))
        if key not in self._stored:  # identical layers share their choices
            self._stored[key] = tuple(self._param_choice(value, state, optimized) for state in stored)
        self._add_op(Op(f"param:{param.fqn}", (), (value,), self._stored[key]))

    def _param_choice(self, value: int, state: State, optimized: bool) -> Choice:
        at = self.states[value].index(state)
        nbytes = self.values[value].state_bytes[at]
        state_bytes = self.optimizer.state_bytes(nbytes) if optimized else 0
        seconds = self.costs.optimizer_s(nbytes, state_bytes) if optimized else 0.0
        return Choice(seconds, (), (at,), persistent_bytes=nbytes + state_bytes, label=str(state))

    def _add_gradient(self, param: ParamInfo, operand: Operand) -> None:
        made = self.value_index[operand.value]
        preimages = self._preimages(operand, self.states[made])
        grad = self._add_value(f"grad:{param.fqn}", operand.tensor, live_out=True)
        stored = self.param_states[param.fqn]
        key = ("grad", id(preimages), id(self.states[grad]), stored)
        if key not in self._stored:
            uses = [self.states[made].index(preimages[state]) for state in stored]
            makes = [self.states[grad].index(state) for state in stored]
            self._stored[key] = tuple(
                Choice(0.0, (u,), (m,), label=str(state)) for u, m, state in zip(uses, makes, stored, strict=True)
            )
        name, tied_to = f"grad:{param.fqn}", self.op_index[f"param:{param.fqn}"]
        self._add_op(Op(name, (made,), (grad,), self._stored[key], tied_to=tied_to, results_start_next=True))

    def _add_outputs(self, outputs: Iterable[tuple[str, Operand, bool]]) -> None:
        for name, operand, whole in outputs:
            value = self.value_index[operand.value]
            preimages = self._preimages(operand, self.states[value])
            wanted = [replicated(len(self.mesh))] if whole else [s for s in preimages if can_be_put_in_order(s)]
            uses = sorted({self.states[value].index(preimages[s]) for s in wanted})
            self.output_states[name] = tuple(self.states[value][u] for u in uses)
            if name not in self.trace.whole_outputs:
                self._add_op(Op(f"output:{name}", (value,), (), tuple(Choice(0.0, (u,), ()) for u in uses)))
                continue
            # The caller holds it to the end of the step.
            held = self._add_value(f"output:{name}", operand.tensor, live_out=True)
            made = self.states[held].index(replicated(len(self.mesh)))
            choices = tuple(Choice(0.0, (u,), (made,)) for u in uses)
            self._add_op(Op(f"output:{name}", (value,), (held,), choices, results_start_next=True))

    # -- real ops ----------------------------------------------------------------

    def _add_real_op(self, node: fx.Node) -> None:
        operands = self.flow.operands_of[node]
        results = [(i, t) for i, t in enumerate(result_metas(node)) if t is not None]
        values = [self._add_value(value_name(node, i), t) for i, t in results]
        for value in values:
            self.values[value] = self._waiting.allowed(self.values[value], node, self.states[value])
        operand_values = [self.value_index[o.value] for o in operands]
        tables, twin = [self.states[v] for v in (*operand_values, *values)], self._twin(node.name)
        known = self._offers.get(twin)
        if known is None or known[0] != tables:
            known = self._offers[twin] = (tables, *self._offer(node, operands, operand_values, values))
        self.options[node.name] = known[1]
        self._add_op(Op(node.name, tuple(operand_values), tuple(values), known[2]))

    def _offer(
        self, node: fx.Node, operands: tuple[Operand, ...], operand_values: list[int], values: list[int]
    ) -> tuple[tuple[OpOption, ...], tuple[Choice, ...]]:
        """The options of an op, and the same as choices with their cost; the cheapest of those alike."""
        options = self._options(node, operands)
        if self.pins.allow_option is not None:
            options = tuple(o for o in options if self.pins.allow_option(node, o)) or options
        for avoid in self.pins.avoid_options:
            options = tuple(o for o in options if not avoid(node, o)) or options
        results = [(i, t) for i, t in enumerate(result_metas(node)) if t is not None]
        choices: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Choice, OpOption]] = {}
        for option in options:
            uses = tuple(self.states[v].index(s) for v, s in zip(operand_values, option.base_states, strict=True))
            made = [option.result_states[i] for i, _ in results]
            makes = tuple(self.states[v].index(s) for v, s in zip(values, made, strict=True) if s is not None)
            seconds = self._seconds(node, operands, option)
            if (uses, makes) not in choices or seconds < choices[uses, makes][0].cost_s:
                choices[uses, makes] = (Choice(seconds, uses, makes), option)
        return tuple(option for _, option in choices.values()), tuple(choice for choice, _ in choices.values())

    def _options(self, node: fx.Node, operands: tuple[Operand, ...]) -> tuple[OpOption, ...]:
        rule_sets = [axis_rules(node, size, self.views.fold) for size in self.mesh]
        if not all(r.known for r in rule_sets):
            self.unruled.append(node.name)
        preimages = [self._preimages(o, self.states[self.value_index[o.value]]) for o in operands]
        tensors, found = result_metas(node), []
        made = [
            None if t is None else self.states[self.value_index[value_name(node, i)]] for i, t in enumerate(tensors)
        ]
        for rules in itertools.product(*(r.rules for r in rule_sets)):
            if len(rules) > 1 and not compatible(rules, self.mesh):
                continue
            operand_states = tuple(tuple(r.inputs[slot] for r in rules) for slot in range(len(operands)))
            result_states = tuple(
                None if t is None else _state(tuple(r.outputs[i] for r in rules)) for i, t in enumerate(tensors)
            )
            if any(s not in p for s, p in zip(operand_states, preimages, strict=True)):
                continue
            if any(states is not None and s not in states for states, s in zip(made, result_states, strict=True)):
                continue
            base_states = tuple(p[s] for s, p in zip(operand_states, preimages, strict=True))
            found.append(OpOption(rules, operand_states, base_states, result_states))
        return tuple(found)

    def _seconds(self, node: fx.Node, operands: tuple[Operand, ...], option: OpOption) -> float:
        return op_seconds(self.costs, node, operands, option.rules, option.operand_states, option.result_states)

    # -- recomputation -----------------------------------------------------------

    def _with_recompute_times(self, forward_ops: int) -> list[Op]:
        """The ops, with the times at which they may run again, those of identical layers tied to the first of them
        in order (see `Op.twin_of`)."""
        pinned = self.pins.recompute
        updated = {b.node for b in self.trace.buffers if b.fqn in self.trace.buffer_updates}
        times = recompute_times(self.flow, self.op_index, pinned, updated)
        forced = must_rerun(self.flow, times, pinned) if pinned else set()
        class_of = self._classes()
        first: dict[tuple[object, ...], int] = {}
        offers: dict[int, int] = {}
        number: dict[object, int] = {}  # identical layers share their choices: each is looked at once
        ops = []
        for index, op in enumerate(self.ops):
            if id(op.choices) not in offers:
                states = tuple((c.uses, c.makes) for c in op.choices)
                offers[id(op.choices)] = number.setdefault(states, len(number))
            time = times.get(op.name)
            again = time is not None and op.name in forced
            leader = first.setdefault((class_of[op.name], offers[id(op.choices)], time is None, again), index)
            if time is not None or leader != index:
                twin = None if leader == index else leader
                op = replace(op, recompute_time=time, must_rerun=again, twin_of=twin)
            ops.append(op)
        return ops

    def _twin(self, name: str) -> tuple[object, str]:
        """What ops that do the same in identical layers have in common: their kind, and the name of one of them."""
        return self.pins.kind(name) if self.pins.kind else None, self.trace.twins.get(name, name)

    def _classes(self) -> dict[str, object]:
        """`_twin` of all ops, those of parameters and their gradients included."""
        found: dict[str, object] = {name: self._twin(name) for name in self.op_index}
        for p in (p for p in self.trace.params if p.node in self.trace.twins):
            found |= {f"{what}:{p.fqn}": (what, self._twin(p.node)) for what in ("param", "grad")}
        return found


def _no_state_left(param: ParamInfo, mesh: tuple[int, ...], possible: list[State]) -> str:
    states = "; ".join(", ".join(state) for state in possible[:6]) + ("; ..." if len(possible) > 6 else "")
    return (
        f"parameter {param.fqn} {tuple(param.shape)} cannot be stored as asked for on mesh "
        f"{'x'.join(map(str, mesh)) or '1'}; possible there: {states or 'whole only'}"
    )


def _state(placements: tuple[str | None, ...]) -> State | None:
    return None if None in placements else tuple(p for p in placements if p is not None)
