"""From a trace and decisions to the rank-local graphs of the forward and the backward pass.

The walk is simple: for every op, in order, take each operand's base value in the state
the plan says (converting it if it is not there yet), replay the views, and lower the op.
In the backward pass a value of the forward pass is taken, in this order, from what was
kept, from the parameters and inputs, from running its op again, or from converting its
original. Nothing here knows how the plan was found: a plan written by hand runs as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from autopar.codegen.buckets import GradientBuckets
from autopar.codegen.builder import GraphBuilder
from autopar.codegen.lowerings import lower
from autopar.codegen.offload import fetch, offload, place_last
from autopar.codegen.steps import emit_path
from autopar.dataflow import (
    Dataflow,
    Operand,
    ViewMaps,
    gradient_values,
    is_backward,
    narrow_gradients,
    resolve,
    value_name,
)
from autopar.errors import PlanError
from autopar.grouping import grouped_values
from autopar.placements import State, local_shape, replicated
from autopar.plan_types import Decisions
from autopar.redistribute import Conversions, ConversionTables, Step, StepCosts
from autopar.rules import axis_rules, is_random
from autopar.rules.schema import op_call
from autopar.rules.types import AxisRule
from autopar.trace import Trace

Version = tuple[str, State]  # a base value in a state

_MANY_LAYERS = 6  # from here on gradients are reduced layer by layer: the code of all layers is then the same


@dataclass(frozen=True)
class EmittedProgram:
    """The two rank-local graphs.

    forward_inputs / backward_inputs: what each placeholder after the coordinates takes:
        a joint-graph placeholder or a saved version (name, state).
    saved: versions that the forward graph returns for the backward graph, after its outputs.
    output_states: per forward output (whole outputs, other outputs, buffer updates), its state.
    whole_outputs: how many of the first outputs are whole on every rank; the caller holds them.
    tangents: placeholders of the backward graph's gradients from outside.
    grads: fqns in the order of the backward graph's outputs.
    """

    mesh: tuple[int, ...]
    forward: fx.Graph
    backward: fx.Graph
    forward_inputs: tuple[str, ...]
    backward_inputs: tuple[Version, ...]
    saved: tuple[Version, ...]
    output_names: tuple[str, ...]
    output_states: dict[str, State]
    whole_outputs: int
    tangents: tuple[str, ...]
    grads: tuple[str, ...]


def emit(
    trace: Trace,
    decisions: Decisions,
    mesh: tuple[int, ...],
    costs: StepCosts,
    *,
    bucket_bytes: int | None = None,
) -> EmittedProgram:
    """Write the program of one rank of `mesh`; raises PlanError where the decisions don't fit the trace.

    bucket_bytes: gradients whose reduction is alike wait for each other until a bucket holds this many
    bytes (by default those of `costs`) and are reduced together; 0 reduces each at once.
    """
    return _Emitter(trace, decisions, mesh, costs, costs.bucket_bytes if bucket_bytes is None else bucket_bytes).emit()


class _Emitter:
    def __init__(
        self, trace: Trace, decisions: Decisions, mesh: tuple[int, ...], costs: StepCosts, bucket_bytes: int
    ) -> None:
        self.trace, self.decisions, self.mesh = trace, decisions, mesh
        self.flow, self.costs = Dataflow.of(trace), costs
        self.fold = decisions.fold(trace.fold)
        self.views = ViewMaps(mesh, self.fold)
        self.nodes = {n.name: n for n in trace.graph_module.graph.nodes}
        self.params = {p.node: p.fqn for p in trace.params}
        self.made = self._made_states()
        self.forward = _Pass(self, backward=None)
        self.backward = _Pass(self, backward=self.forward)
        twins = Counter(trace.twins.values())
        self.layered = {name for name, count in twins.items() if count > 1}
        layers = max(twins.values(), default=0)
        self.buckets = GradientBuckets(self.backward.builder, bucket_bytes, by_layer=layers >= _MANY_LAYERS)
        self.tables = ConversionTables(mesh, costs, self.fold)
        self.gradients = gradient_values(self.flow, trace.grads.values())
        self.narrow = narrow_gradients(self.flow, trace.grads.values())
        self.grouped = grouped_values(trace.graph_module.graph)

    def emit(self) -> EmittedProgram:
        tangents = self.trace.tangents
        for node in self.flow.placeholders:
            if node.name not in tangents:
                self.forward.add_placeholder(node)
        for node in self.flow.ops:
            if not is_backward(node):
                self.forward.emit_op(node)
        outputs, states = self._forward_outputs()
        grads, grad_nodes = self._emit_backward()
        given = {*self.forward.inputs, *((name, replicated(len(self.mesh))) for name in tangents)}
        saved = tuple(v for v in self.backward.inputs if v not in given)
        place_last(self.forward.builder.graph, self.forward.away.values())
        left = {**self.forward.versions, **self.forward.away}
        self.forward.builder.output([*outputs.values(), *(left[v] for v in saved)])
        self.backward.builder.output(grad_nodes)
        return EmittedProgram(
            mesh=self.mesh,
            forward=self.forward.builder.graph,
            backward=self.backward.builder.graph,
            forward_inputs=tuple(n.name for n in self.flow.placeholders if n.name not in tangents),
            backward_inputs=tuple(self.backward.inputs),
            saved=saved,
            output_names=tuple(outputs),
            output_states=states,
            whole_outputs=len(self.trace.whole_outputs),
            tangents=tangents,
            grads=grads,
        )

    def _emit_backward(self) -> tuple[tuple[str, ...], list[fx.Node]]:
        """All backward ops; each gradient's reduction is started when the gradient is there."""
        grads = tuple(p.fqn for p in self.trace.params if p.fqn in self.trace.grads)
        operands = {fqn: resolve(self.nodes[self.trace.grads[fqn]]) for fqn in grads}
        ready: dict[fx.Node, list[str]] = {}
        for fqn, operand in operands.items():
            ready.setdefault(operand.node, []).append(fqn)
        for node in self.flow.ops:
            if is_backward(node):
                self.backward.emit_op(node)
            for fqn in ready.pop(node, ()) if is_backward(node) else ():
                self._reduce_gradient(operands[fqn], self._gradient_state(fqn, operands[fqn]))
        self.buckets.flush_all()
        states = {fqn: self._gradient_state(fqn, operand) for fqn, operand in operands.items()}
        return grads, [self.backward.take(operands[fqn], states[fqn])[0] for fqn in grads]

    def _gradient_state(self, fqn: str, operand: Operand) -> State:
        base_states = self.table(operand).states
        return self.views.preimages(operand, base_states)[self.decisions.params[fqn]]

    def _reduce_gradient(self, operand: Operand, state: State) -> None:
        made, key = self.made[operand.value], (operand.value, state)
        if key in self.backward.versions or made == state:
            return
        path = self.path(operand, state)
        source = self.backward.version(operand, made)

        def done(node: fx.Node) -> None:
            node.meta["version"] = (operand.node.name, operand.index, state)
            self.backward.versions.setdefault(key, node)

        kind = self.trace.twins.get(operand.node.name)
        self.buckets.add(source, path, done, kind if kind in self.layered else None)

    def _made_states(self) -> dict[str, State]:
        made: dict[str, State] = {}
        for node in self.flow.placeholders:
            fqn = self.params.get(node.name)
            made[node.name] = self.decisions.params[fqn] if fqn else replicated(len(self.mesh))
        for name, decision in self.decisions.nodes.items():
            for index, state in enumerate(decision.result_states):
                if state is not None:
                    made[value_name(self.nodes[name], index)] = state
        return made

    def table(self, operand: Operand) -> Conversions:
        """The conversions of an operand's base value."""
        return self.tables.of(
            operand.base_tensor,
            bucketed=operand.value in self.gradients,
            summable=operand.value not in self.narrow,
            grouped=operand.value in self.grouped,
        )

    def path(self, operand: Operand, state: State) -> tuple[Step, ...]:
        """The conversion of an operand's base value from the state it is made in."""
        made = self.made[operand.value]
        try:
            return self.table(operand).path(made, state)
        except (KeyError, ValueError):
            raise PlanError(f"the plan makes {operand.value} in {made} and takes it in {state}: no way there") from None

    def _forward_outputs(self) -> tuple[dict[str, fx.Node], dict[str, State]]:
        outputs, states = {}, {}
        leaves = [o.node for o in self.trace.outputs if o.node]
        for name in dict.fromkeys([*self.trace.whole_outputs, *leaves, *self.trace.buffer_updates.values()]):
            operand = resolve(self.nodes[name])
            base_state = self.decisions.outputs[name]
            outputs[name], states[name] = self.forward.take(operand, base_state)
        return outputs, states


def _mark_growth(source: fx.Node, converted: fx.Node) -> None:
    """Note on the nodes of a conversion that its result is larger than what it began with."""
    grows = converted.meta["val"].numel() > source.meta["val"].numel()
    at = converted
    while grows and at is not source:
        at.meta["grows"] = True
        at = next(i for i in at.all_input_nodes if not isinstance(i.meta["val"], int))


def _lowered(
    builder: GraphBuilder, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]
) -> Sequence[fx.Node | None]:
    """`lower`, with one PlanError where the local shapes that the plan gives an op do not go together."""
    try:
        return lower(builder, node, rules, operands)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shapes = ", ".join(str(tuple(o.meta["val"].shape)) for o in operands)
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PlanError(
            f"op {node.name} ({node.target}) cannot run on parts of shape {shapes}, as the plan says ({reason}); "
            "plan this model again"
        ) from error


class _Pass:
    """The emission of one pass: which versions of which values exist so far."""

    def __init__(self, emitter: _Emitter, backward: _Pass | None) -> None:
        self.emitter = emitter
        self.forward = backward  # the forward pass, seen from the backward pass
        fake_mode = next(iter(emitter.flow.placeholders)).meta["val"].fake_mode
        by_exchange = emitter.costs.scatters_by_exchange
        self.builder = GraphBuilder(emitter.mesh, fake_mode, scatters_by_exchange=by_exchange)
        self.versions: dict[Version, fx.Node] = {}
        self.inputs: list[Version] = []
        self.away: dict[Version, fx.Node] = {}  # what the forward pass copies to the host
        self._viewed: dict[tuple[fx.Node, int, fx.Node], fx.Node] = {}

    def add_placeholder(self, node: fx.Node) -> None:
        """A parameter, buffer or input, as the forward graph takes it."""
        state = self.emitter.made[node.name]
        tensor = node.meta["val"]
        shape = local_shape(tensor.shape, state, self.emitter.mesh)
        if shape is None:
            raise PlanError(f"{node.name} {tuple(tensor.shape)} cannot be cut as {state} on mesh {self.emitter.mesh}")
        self.versions[node.name, state] = self.builder.local_input(node.name, tensor, shape)
        self.inputs.append((node.name, state))

    def emit_op(self, node: fx.Node) -> None:
        """Take the operands, lower the op, register its results."""
        decision = self.emitter.decisions.nodes.get(node.name)
        if decision is None:
            raise PlanError(f"the plan says nothing about op {node.name} ({node.target}); plan this model again")
        operands = self.emitter.flow.operands_of[node]
        taken = [self.take(o, s)[0] for o, s in zip(operands, decision.operand_states, strict=True)]
        self.builder.origin = node.name
        results = _lowered(self.builder, node, decision.rules, taken)
        for index, (result, state) in enumerate(zip(results, decision.result_states, strict=True)):
            if state is not None and result is not None:
                result.meta["version"] = (node.name, index, state)
                self.versions[value_name(node, index), state] = result

    def take(self, operand: Operand, base_state: State) -> tuple[fx.Node, State]:
        """The operand, its base value in `base_state`, and the state in which that puts it."""
        at = self.version(operand, base_state)
        state = base_state
        for view in operand.views:
            rules = self._view_rules(view.node, view.index, state)
            key = (view.node, view.index, at)
            if key not in self._viewed:
                self.builder.origin = view.node.name
                viewed = _lowered(self.builder, view.node, rules, [at])[view.index]
                assert viewed is not None
                self._viewed[key] = viewed
            at = self._viewed[key]
            state = tuple(r.outputs[view.index] or "R" for r in rules)
        return at, state

    def _view_rules(self, node: fx.Node, index: int, state: State) -> tuple[AxisRule, ...]:
        found = []
        for placement, size in zip(state, self.emitter.mesh, strict=True):
            known = axis_rules(node, size, self.emitter.fold).rules
            rules = [r for r in known if r.inputs[0] == placement and r.lowering == "local"]
            if not rules:
                raise PlanError(f"view {node.name} ({node.target}) cannot follow its operand in {state}")
            found.append(rules[0])
        return tuple(found)

    def version(self, operand: Operand, state: State) -> fx.Node:
        """The base value of an operand in a state, converted, fetched or recomputed if need be."""
        key = (operand.value, state)
        if key not in self.versions:
            fetched = self._fetch(operand, state)
            self.versions[key] = self._convert(operand, state) if fetched is None else fetched
        return self.versions[key]

    def _convert(self, operand: Operand, state: State) -> fx.Node:
        made = self.emitter.made[operand.value]
        if made == state:
            raise PlanError(f"{operand.value} is needed in the backward pass but neither kept nor recomputed")
        source = self.version(operand, made)
        path = self.emitter.path(operand, state)
        self.builder.origin = operand.value
        alive = operand.node.op == "placeholder"
        converted = emit_path(self.builder, source, path, keep_source_alive=alive)
        _mark_growth(source, converted)
        converted.meta["version"] = (operand.node.name, operand.index, state)
        return converted

    def _fetch(self, operand: Operand, state: State) -> fx.Node | None:
        """For the backward pass: a version that the forward pass left, or the original made again."""
        if self.forward is None or (operand.node.op != "placeholder" and is_backward(operand.node)):
            return None
        decisions, made = self.emitter.decisions, self.emitter.made[operand.value]
        version = (operand.value, state)
        if operand.node.op == "placeholder":
            if state != made and version not in decisions.kept_copies:
                return None
            return self._saved(operand, version)
        if (state == made and operand.value in decisions.kept) or version in decisions.kept_copies:
            return self._saved(operand, version)
        if state == made and operand.value in decisions.offloaded:
            return self._fetch_from_host(operand, version)
        if state == made and decisions.nodes[operand.node.name].recompute:
            if is_random(op_call(operand.node)):
                raise PlanError(f"the plan draws the random numbers of {operand.node.name} twice; keep them instead")
            self.emit_op(operand.node)
            return self.versions[version]
        return None

    def _fetch_from_host(self, operand: Operand, version: Version) -> fx.Node:
        forward = self.forward
        assert forward is not None
        original = forward.versions[version]
        forward.builder.origin = operand.node.name
        forward.away[version] = offload(forward.builder, original)
        host = self.builder.placeholder(operand.node.name, forward.away[version].meta["val"])
        self.inputs.append(version)
        self.builder.origin = operand.node.name
        fetched = fetch(self.builder, host, original.meta["val"].device)
        fetched.meta["version"] = (operand.node.name, operand.index, version[1])
        return fetched

    def _saved(self, operand: Operand, version: Version) -> fx.Node:
        assert self.forward is not None
        if operand.node.name in self.emitter.trace.tangents:
            node = self.builder.placeholder(operand.node.name, operand.base_tensor)
        elif version in self.forward.versions:
            node = self.builder.placeholder(operand.node.name, self.forward.versions[version].meta["val"])
        else:
            raise PlanError(f"the plan keeps {version[0]} in {version[1]}, which the forward pass never makes")
        self.inputs.append(version)
        if version in self.forward.versions:
            self._keep_counts(version, node)
        return node

    def _keep_counts(self, version: Version, ends: fx.Node) -> None:
        """How many rows come to groups that end there: the forward pass was told."""
        forward = self.forward
        assert forward is not None
        for axis, counts in forward.builder.received_by(forward.versions[version]).items():
            key = (f"{version[0]} received on axis {axis}", version[1])
            forward.versions[key] = counts
            self.inputs.append(key)
            self.builder.know_received(ends, axis, self.builder.placeholder(ends.name, counts.meta["val"]))
