"""Writes one graph of a stage: nodes of an emitted program copied, with placeholders for what comes from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import torch
from torch import fx

from autopar.codegen.builder import GraphBuilder, is_collective
from autopar.codegen.emit import Version
from autopar.codegen.stage_demand import Side, Value
from autopar.codegen.stage_types import StagePass
from autopar.codegen.storages import storages


class GraphCopy:
    """A graph under construction.

    available: values that the graph may take as inputs, with their fake tensors, by value.
    given: versions of the placeholders of the joint graph, by placeholder of an emitted graph.
    resolve: where the stage has the result of a node of the backward graph from, see `Demands.source`.
    """

    def __init__(
        self,
        builder: GraphBuilder,
        available: Mapping[Value, torch.Tensor],
        given: Mapping[fx.Node, Version],
        name_of: Callable[[Value], Version],
        resolve: Callable[[fx.Node], Value | bool],
    ) -> None:
        self.builder, self.available, self.given = builder, available, given
        self.name_of, self.resolve = name_of, resolve
        self.env: dict[Value, fx.Node] = {}
        self.inputs: list[Version] = []
        self._taken: dict[Version, fx.Node] = {}

    def compute(self, side: Side, nodes: Container[fx.Node], order: Iterable[fx.Node]) -> None:
        """Copy those of `nodes`, in their order in the emitted graph."""
        for node in order:
            if node in nodes:
                self.env[Value(side, node)] = self._copy(side, node)

    def result(self, value: Value) -> fx.Node:
        """The node of this graph that holds a value: computed already, or taken as an input."""
        if value in self.env:
            return self.env[value]
        if value in self.available:
            self.env[value] = self._input(self.name_of(value), self.available[value])
            return self.env[value]
        node = value.node
        source = self.resolve(node) if value.side is Side.BACKWARD else False
        if isinstance(source, Value):
            return self.result(source)
        assert node.op == "placeholder", f"{node.name} is neither computed nor taken"
        if node in self.given:
            return self._input(self.given[node], node.meta["val"])
        return self.builder.coord(int(str(node.target).removeprefix("coord")))

    def sent(self, value: Value) -> fx.Node:
        """The node that holds a value, contiguous, as messages are."""
        self.builder.origin = str(value.node.meta.get("origin", value.node.name))
        return self.builder.contiguous(self.result(value))

    def close(self, results: Sequence[fx.Node]) -> StagePass:
        """The finished pass."""
        self.builder.output(results)
        return StagePass(self.builder.graph, tuple(self.inputs))

    def _input(self, version: Version, tensor: torch.Tensor) -> fx.Node:
        if version not in self._taken:
            name = version[0].replace("#", "_").replace(".", "_")
            self._taken[version] = self.builder.placeholder(name, tensor)
            self.inputs.append(version)
        return self._taken[version]

    def _still_true(self, node: fx.Node, operands: Mapping[fx.Node, fx.Node]) -> bool:
        """Whether the fake result of a node is that of its copy: operands alike, and no view."""
        changed = [i for i, new in operands.items() if i.meta["val"] is not new.meta["val"]]
        if not all(_alike(i.meta["val"], operands[i].meta["val"]) for i in changed):
            return False
        return not set(storages([node])) & set(storages(changed))

    def _copy(self, side: Side, node: fx.Node) -> fx.Node:
        operands = {i: self.result(Value(side, i)) for i in node.all_input_nodes}
        self.builder.origin = node.meta.get("origin")
        if is_collective(node):
            tensors = {i: new for i, new in operands.items() if isinstance(new.meta["val"], torch.Tensor)}
            operands |= {i: self.builder.contiguous(new) for i, new in tensors.items()}  # others are coordinates
        if self._still_true(node, operands):
            made = self.builder.graph.node_copy(node, operands.__getitem__)
        else:  # a value that came by a message may lie in memory in another way
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), operands.__getitem__)
            made = self.builder.call(node.target, *args, **kwargs)  # type: ignore[arg-type]
            made.meta = {**node.meta, "val": made.meta["val"]}
        return made


def received(tensor: torch.Tensor) -> torch.Tensor:
    """The fake tensor of what arrives."""
    return tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _alike(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b)
