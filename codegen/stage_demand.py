"""What each stage of a cut program must hold: which values it computes, takes from a neighbour, saves and sends.

Asked from the results backwards: every gradient asks for what it is made of, and what another stage makes is asked of
the neighbour on the way there, who asks its own neighbour in turn. So each value travels from stage to stage, and a
stage that nobody asks for a value does not compute it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import fx

from autopar._torch_compat import OpOverload
from autopar.codegen.emit import EmittedProgram, Version
from autopar.codegen.stage_nodes import StageNodes
from autopar.rules import is_view


class Side(Enum):
    """Which of the two emitted graphs a node is in."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Value(NamedTuple):
    """The result of a node of one of the two emitted graphs."""

    side: Side
    node: fx.Node


@dataclass
class StageDemand:
    """What one stage does. Sets are ordered (dicts without values).

    forward / backward: nodes it computes. given: placeholders of the joint graph that the forward pass takes.
    received_*, saved: values. sends are what the neighbour receives. outputs: names. gradients: parameters.
    """

    forward: dict[fx.Node, None] = field(default_factory=dict)
    backward: dict[fx.Node, None] = field(default_factory=dict)
    received_forward: dict[Value, None] = field(default_factory=dict)
    received_backward: dict[Value, None] = field(default_factory=dict)
    saved: dict[Value, None] = field(default_factory=dict)
    outputs: dict[str, fx.Node] = field(default_factory=dict)
    gradients: dict[str, fx.Node] = field(default_factory=dict)


class LocalStages:
    """The stages of the nodes of the two emitted graphs, and where the inputs of the backward graph come from.

    A node belongs to the stage of the op that it was emitted for. Of no stage of their own are conversions of
    parameters and inputs, numbers, views and conversions that are no smaller than what they are made of, and what the
    backward pass converts or runs again of the forward pass: whoever needs them makes them.
    """

    def __init__(self, emitted: EmittedProgram, stages: StageNodes, backward_ops: frozenset[str]) -> None:
        self.emitted, self.stages, self.backward_ops = emitted, stages, backward_ops
        axes = len(emitted.mesh)
        self.results = list(emitted.forward.output_node().args[0])  # type: ignore[arg-type]
        saved_nodes = self.results[len(emitted.output_names) :]
        self.saved = dict(zip(emitted.saved, saved_nodes, strict=True))
        placeholders = [n for n in emitted.backward.nodes if n.op == "placeholder"][axes:]
        self.taken: dict[fx.Node, Version] = dict(zip(placeholders, emitted.backward_inputs, strict=True))
        forward = [n for n in emitted.forward.nodes if n.op == "call_function"]
        self.originals: dict[Version, fx.Node] = {}
        for node in forward:
            if (version := version_of(node)) is not None:
                self.originals.setdefault(version, node)
        self.of: dict[fx.Node, int | None] = {}
        for node in forward:
            self.of[node] = self._forward_stage(node)
        for node in emitted.backward.nodes:
            if node.op == "call_function":
                self.of[node] = self._backward_stage(node)
        for node in reversed(list(self.of)):
            self._convert_where_used(node)

    def _convert_where_used(self, converted: fx.Node) -> None:
        """Of a gradient that a stage takes both as it was made and converted, only the former has to travel there."""
        here, version = self.of[converted], version_of(converted)
        if here is None or version is None or not self.is_backward_op(converted):
            return
        chain = [converted]
        while (before := _only_operand(chain[-1])) is not None and version_of(before) is None:
            chain.append(before)
        source = version_of(before) if before is not None else None
        if before is None or source is None or source[0] != version[0] or any(self.of[link] != here for link in chain):
            return
        last = max(self._users(converted), default=here)
        if last < here and any(stage <= last for stage in self._users(before, but=chain)):
            self.of.update(dict.fromkeys(chain, last))

    def _users(self, node: fx.Node, but: Sequence[fx.Node] = ()) -> Iterator[int]:
        """The stages that use a node's result, seen through what has no stage; one past the last for a result
        of the program."""
        for user in node.users:
            stage = self.of.get(user)
            if user not in but and user.op == "output":
                yield self.stages.count
            elif user not in but:
                yield from self._users(user) if stage is None else (stage,)

    def _forward_stage(self, node: fx.Node) -> int | None:
        own = self._stage_of_origin(node)
        above = [s for i in node.all_input_nodes if (s := self.of.get(i)) is not None]
        if own is None and not above:
            return None
        return max([*above, *([] if own is None else [own])])

    def _backward_stage(self, node: fx.Node) -> int | None:
        if not self.is_backward_op(node):
            return None
        own = node.meta.get("stage", self._stage_of_origin(node))
        behind = [s for i in node.all_input_nodes if (s := self.of.get(i)) is not None]
        if own is None and not behind:
            return None
        return min([*behind, *([] if own is None else [own])])

    def _stage_of_origin(self, node: fx.Node) -> int | None:
        if not holds_tensors(node):
            return None
        return self.stages.of.get(origin_of(node))

    def is_backward_op(self, node: fx.Node) -> bool:
        """Whether a node of the backward graph was emitted for a backward op (else: for a forward value)."""
        return origin_of(node) in self.backward_ops

    def made_at(self, node: fx.Node, stage: int) -> bool:
        """Whether a stage that needs a node's result makes it itself."""
        return self.of[node] in (None, stage) or follows(node) or bool(node.meta.get("grows"))

    def forward_twin(self, node: fx.Node, stage: int) -> fx.Node | None:
        """For what the backward pass runs again: the original, if another stage ran that."""
        version = version_of(node)
        original = self.originals.get(version) if version is not None else None
        if original is None or self.is_backward_op(node) or self.of[original] in (None, stage):
            return None
        return original


def version_of(node: fx.Node) -> Version | None:
    """The base value, and its state, that a node of an emitted graph holds; None if it is no whole one."""
    if "version" not in node.meta:
        return None
    name, index, state = node.meta["version"]
    return (name if index == 0 else f"{name}#{index}", state)


def origin_of(node: fx.Node) -> str:
    """The node of the joint graph that a node was emitted for."""
    return str(node.meta.get("origin", "")).partition("#")[0]


def holds_tensors(node: fx.Node) -> bool:
    """Whether a node's result is a tensor or several, and not a number."""
    return isinstance(node.meta["val"], (torch.Tensor, tuple, list))


def follows(node: fx.Node) -> bool:
    """Whether a node is a view that is no smaller than what it looks at: then that travels in its place."""
    if not isinstance(node.target, OpOverload) or not is_view(node.target):
        return False
    (base, *_) = node.all_input_nodes
    whole = base.meta["val"]
    return isinstance(whole, torch.Tensor) and node.meta["val"].numel() >= whole.numel()


def _only_operand(node: fx.Node) -> fx.Node | None:
    """The tensor that a node takes, if it is one and some node's result."""
    tensors = [i for i in node.all_input_nodes if holds_tensors(i)]
    return tensors[0] if len(tensors) == 1 and tensors[0].op != "placeholder" else None


class Demands:
    """All stages' demands, made at once.

    outputs: node names, each with the stage that is to hand it out if it can be computed anywhere.
    """

    def __init__(
        self, local: LocalStages, outputs: Mapping[str, int], gradients: Iterable[tuple[str, int, fx.Node]]
    ) -> None:
        self.local = local
        self.stages = [StageDemand() for _ in range(local.stages.count)]
        last = local.stages.count - 1
        for fqn, stage, node in gradients:
            self.stages[stage].gradients[fqn] = node
            self.backward(stage, node)
        names = dict(zip(local.emitted.output_names, local.results, strict=False))
        for name in outputs:
            made = local.of.get(names[name])
            self.stages[outputs[name] if made is None else made].outputs[name] = names[name]
        for stage in reversed(range(last + 1)):
            for node in self.stages[stage].outputs.values():
                self.forward(stage, node)

    def value(self, stage: int, value: Value) -> None:
        """A stage's backward pass needs a value."""
        if value.side is Side.BACKWARD:
            self.backward(stage, value.node)
            return
        made = self.local.of.get(value.node)
        if made is None or made <= stage:
            if value not in self.stages[stage].saved:
                self.stages[stage].saved[value] = None
                self.forward(stage, value.node)
        elif value not in self.stages[stage].received_backward:
            self.stages[stage].received_backward[value] = None
            self.value(stage + 1, value)

    def forward(self, stage: int, node: fx.Node) -> None:
        """A stage's forward pass must hold the result of a node."""
        stack = [(stage, node)]
        while stack:
            at, node = stack.pop()
            demand = self.stages[at]
            if (
                node.op == "placeholder"
                or node in demand.forward
                or Value(Side.FORWARD, node) in demand.received_forward
            ):
                continue
            if self.local.made_at(node, at):
                demand.forward[node] = None
                stack += [(at, i) for i in node.all_input_nodes]
            else:
                demand.received_forward[Value(Side.FORWARD, node)] = None
                stack.append((at - 1, node))

    def backward(self, stage: int, node: fx.Node) -> None:
        """A stage's backward pass must hold the result of a node of the backward graph."""
        stack = [(stage, node)]
        while stack:
            at, node = stack.pop()
            demand = self.stages[at]
            if node in demand.backward or Value(Side.BACKWARD, node) in demand.received_backward:
                continue
            source = self.source(at, node)
            if isinstance(source, Value) and source.side is Side.FORWARD:
                self.value(at, source)
            elif isinstance(source, Value):
                demand.received_backward[source] = None
                stack.append((at + 1, node))
            elif source:
                demand.backward[node] = None
                stack += [(at, i) for i in node.all_input_nodes]

    def source(self, stage: int, node: fx.Node) -> Value | bool:
        """Where a stage has the result of a node of the backward graph from.

        A value of the forward pass, or one that the stage behind sends; True if it computes it; False for a
        placeholder of the joint graph or a coordinate.
        """
        local = self.local
        if node.op == "placeholder":
            original = local.saved.get(local.taken[node]) if node in local.taken else None
            return Value(Side.FORWARD, original) if original is not None and original.op != "placeholder" else False
        twin = local.forward_twin(node, stage)
        if twin is not None:
            return Value(Side.FORWARD, twin)
        return True if local.made_at(node, stage) else Value(Side.BACKWARD, node)


def name_of(value: Value, local: LocalStages) -> Version:
    """A name for a value that no other value of its stage has."""
    version = version_of(value.node)
    if version is not None:
        if value.side is Side.FORWARD and local.originals.get(version) is value.node:
            return version
        if value.side is Side.BACKWARD and local.is_backward_op(value.node):
            return version
    return f"{value.side.value}.{value.node.name}", ()
