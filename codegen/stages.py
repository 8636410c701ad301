"""Cuts an emitted program into the stages of a pipeline.

    trace, decisions -> emitted program of one micro-batch (codegen.emit) -> stages of its nodes (codegen.stage_nodes)
    -> what each stage computes, takes and sends (codegen.stage_demand) -> three graphs a stage and its reductions

There is no second emitter: a stage's graphs are copies of nodes of the program that would run without stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from autopar.codegen.builder import GraphBuilder
from autopar.codegen.emit import EmittedProgram, Version, emit
from autopar.codegen.inplace import reuse_in
from autopar.codegen.overlap import overlap
from autopar.codegen.stage_copy import GraphCopy, received
from autopar.codegen.stage_demand import Demands, LocalStages, Side, Value, name_of
from autopar.codegen.stage_gather import gather_once
from autopar.codegen.stage_gradients import split_gradients, summed_first
from autopar.codegen.stage_nodes import StageNodes
from autopar.codegen.stage_reductions import write_reductions
from autopar.codegen.stage_split import Split
from autopar.codegen.stage_types import NOTHING, Message, PipelineProgram, StagePass, StageProgram
from autopar.dataflow import is_backward
from autopar.errors import PlanError
from autopar.placements import replicated
from autopar.plan_types import Decisions
from autopar.redistribute import StepCosts
from autopar.trace import Trace


def emit_stages(
    trace: Trace,
    decisions: Decisions,
    mesh: tuple[int, ...],
    costs: StepCosts,
    stages: StageNodes,
    *,
    reduce_each: bool = False,
    gather_each: bool = True,
) -> PipelineProgram:
    """The pipeline of a model, on one rank of each stage's mesh.

    trace: of one micro-batch (of all ranks of a stage together). stages: see `stages_by_blocks`, `stages_by_cuts`.
    reduce_each: reduce gradients over ranks after every micro-batch, for gradients that no rank can hold whole (ZeRO
        stages 2 and 3); by default once a step.
    gather_each: gather parameters that are stored in parts for each micro-batch (ZeRO stage 3), else once a step.
    Raises PlanError as `emit` does.
    """
    with torch.no_grad():
        emitted = emit(trace, decisions, mesh, costs, bucket_bytes=0)
        return cut_program(
            trace,
            decisions,
            emitted,
            stages,
            reduce_each=reduce_each,
            gather_each=gather_each,
            bucket_bytes=costs.bucket_bytes,
        )


def cut_program(
    trace: Trace,
    decisions: Decisions,
    emitted: EmittedProgram,
    stages: StageNodes,
    *,
    reduce_each: bool = False,
    gather_each: bool = True,
    bucket_bytes: int = 0,
) -> PipelineProgram:
    """The stages of an emitted program, which had its gradients reduced one by one; its backward graph is used up.

    bucket_bytes: of gradients that are summed over ranks together when the step ends.
    """
    if trace.loss is None:
        raise PlanError("a model with pipeline stages must return its loss: there is nobody to make one of its outputs")
    backward = frozenset(n.name for n in trace.graph_module.graph.nodes if n.op == "call_function" and is_backward(n))
    local = LocalStages(emitted, stages, backward)
    gradients = split_gradients(local)
    summed = {(f, s): node if reduce_each else summed_first(node) for f, s, node in gradients}
    last = stages.count - 1
    updates = {node: stages.of_module(fqn.rpartition(".")[0], last) for fqn, node in trace.buffer_updates.items()}
    outputs = {trace.loss: last, **updates}
    demands = Demands(local, outputs, [(f, s, summed[f, s]) for f, s, _ in gradients])
    cutter = _Cutter(trace, decisions, local, demands, bucket_bytes)
    written = cutter.write({(f, s): node for f, s, node in gradients})
    if not gather_each:
        params = {p.node for p in trace.params}
        written = tuple(gather_once(stage, params) for stage in written)
    for stage in written:
        for graph in (stage.forward.graph, stage.backward.graph, stage.weights.graph, stage.reduce):
            overlap(graph)
            reuse_in(graph)
    return PipelineProgram(emitted.mesh, written, _owners(trace, written))


def _owners(trace: Trace, stages: Sequence[StageProgram]) -> dict[str, int]:
    """The first stage that takes each parameter; the first of all for those that none takes."""
    return {p.fqn: next((s.index for s in stages if p.fqn in s.params), 0) for p in trace.params}


class _Cutter:
    """Writes the graphs of all stages: forward ones first to last, backward ones last to first, as messages go."""

    def __init__(
        self, trace: Trace, decisions: Decisions, local: LocalStages, demands: Demands, bucket_bytes: int
    ) -> None:
        self.trace, self.local, self.demands, self.bucket_bytes = trace, local, demands, bucket_bytes
        emitted = self.emitted = local.emitted
        axes = len(emitted.mesh)
        params = {p.node: decisions.params[p.fqn] for p in trace.params}
        placeholders = [n for n in emitted.forward.nodes if n.op == "placeholder"][axes:]
        versions = [(name, params.get(name, replicated(axes))) for name in emitted.forward_inputs]
        self.given: dict[fx.Node, Version] = {**dict(zip(placeholders, versions, strict=True)), **local.taken}
        self.order = {Side.FORWARD: list(emitted.forward.nodes), Side.BACKWARD: list(emitted.backward.nodes)}
        self.fake_mode = next(iter(trace.graph_module.graph.nodes)).meta["val"].fake_mode
        self.forward_messages: list[Message] = []
        self.backward_messages: dict[int, Message] = {}

    def write(self, gradients: Mapping[tuple[str, int], fx.Node]) -> tuple[StageProgram, ...]:
        """All stages. gradients: (parameter, stage) -> the node that is the reduced gradient."""
        stages = self.demands.stages
        forward = [self._forward(at) for at in range(len(stages))]
        written = []
        for at in reversed(range(len(stages))):
            reduced = {fqn: gradients[fqn, at] for fqn in stages[at].gradients}
            written.append(self._stage(at, *forward[at], reduced))
        return tuple(reversed(written))

    def _copy(self, at: int, available: Mapping[Value, torch.Tensor]) -> GraphCopy:
        def resolve(node: fx.Node) -> Value | bool:
            return self.demands.source(at, node)

        def named(value: Value) -> Version:
            return name_of(value, self.local)

        return GraphCopy(self._builder(), available, self.given, named, resolve)

    def _builder(self) -> GraphBuilder:
        return GraphBuilder(self.emitted.mesh, self.fake_mode)

    def _arrived(self, values: Sequence[Value], message: Message) -> dict[Value, torch.Tensor]:
        with self.fake_mode:
            return {value: received(tensor) for value, tensor in zip(values, message.tensors, strict=True)}

    def _message(self, values: Sequence[Value], nodes: Sequence[fx.Node]) -> Message:
        return Message(tuple(name_of(v, self.local) for v in values), tuple(n.meta["val"] for n in nodes))

    def _forward(self, at: int) -> tuple[StagePass, Mapping[Value, fx.Node]]:
        demand = self.demands.stages[at]
        last = at + 1 == len(self.demands.stages)
        sends = [] if last else list(self.demands.stages[at + 1].received_forward)
        message = self.forward_messages[at - 1] if at else NOTHING
        copy = self._copy(at, self._arrived(list(demand.received_forward), message))
        copy.compute(Side.FORWARD, demand.forward, self.order[Side.FORWARD])
        sent = [copy.sent(v) for v in sends]
        self.forward_messages.append(self._message(sends, sent))
        kept = [copy.result(v) for v in (*(Value(Side.FORWARD, n) for n in demand.outputs.values()), *demand.saved)]
        return copy.close([*sent, *kept]), copy.env

    def _stage(
        self, at: int, forward: StagePass, made: Mapping[Value, fx.Node], reduced: Mapping[str, fx.Node]
    ) -> StageProgram:
        demand, split = self.demands.stages[at], Split(self.demands, at)
        saved = {value: made[value].meta["val"] for value in demand.saved}
        message = self.backward_messages.get(at + 1, NOTHING)
        copy = self._copy(at, {**saved, **self._arrived(list(demand.received_backward), message)})
        copy.compute(Side.BACKWARD, split.early_nodes, self.order[Side.BACKWARD])
        sent = [copy.sent(v) for v in split.sends]
        self.backward_messages[at] = self._message(split.sends, sent)
        carried = {value: copy.result(value) for value in split.carried}
        backward = copy.close([*sent, *(copy.result(v) for v in split.early.values()), *carried.values()])
        copy = self._copy(at, {**saved, **{value: node.meta["val"] for value, node in carried.items()}})
        copy.compute(Side.BACKWARD, split.late_nodes, self.order[Side.BACKWARD])
        weights = copy.close([copy.result(v) for v in split.late.values()])
        return StageProgram(
            index=at,
            mesh=self.emitted.mesh,
            forward=forward,
            backward=backward,
            weights=weights,
            reduce=self._reduce({**split.early, **split.late}, reduced),
            receives_forward=self.forward_messages[at - 1] if at else NOTHING,
            sends_forward=self.forward_messages[at],
            receives_backward=message,
            sends_backward=self.backward_messages[at],
            saved_forward=tuple(name_of(v, self.local) for v in saved),
            saved_backward=tuple(name_of(v, self.local) for v in carried),
            params=self._params((forward, backward, weights)),
            outputs=tuple(demand.outputs),
            grads_early=tuple(split.early),
            grads_late=tuple(split.late),
        )

    def _reduce(self, sums: Mapping[str, Value], reduced: Mapping[str, fx.Node]) -> fx.Graph:
        builder = self._builder()
        write_reductions(builder, {fqn: v.node for fqn, v in sums.items()}, reduced, self.bucket_bytes)
        return builder.graph

    def _params(self, passes: Sequence[StagePass]) -> tuple[str, ...]:
        taken = {name for one in passes for name, _ in one.inputs}
        return tuple(p.fqn for p in self.trace.params if p.node in taken)
