"""Runs an emitted program on this rank: binds it to process groups and calls its two graphs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx

from autopar._torch_compat import boxed_codegen
from autopar.codegen.builder import GROUP_PREFIX, c10d
from autopar.codegen.emit import EmittedProgram, Version
from autopar.codegen.fold import fold
from autopar.codegen.grouped import take_grouped_products
from autopar.codegen.images import put_channels_innermost
from autopar.codegen.products import take_faster_products


def bind_groups(graph: fx.Graph, group_names: Sequence[str]) -> fx.Graph:
    """A copy of `graph` to run: the tokens of mesh axes are the names of real process groups, and ops are done in the
    way that is fastest on the device."""

    def bound(argument: Any) -> Any:
        if isinstance(argument, str) and argument.startswith(GROUP_PREFIX):
            return group_names[int(argument.removeprefix(GROUP_PREFIX))]
        return argument

    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.nodes:
        if node.op == "call_function":
            node.args = tuple(bound(a) for a in node.args)
            node.kwargs = {k: bound(v) for k, v in node.kwargs.items()}
    take_faster_products(copy)
    take_grouped_products(copy)
    return copy


def hand_out_early(graph: fx.Graph, first: int) -> tuple[int, ...]:
    """Let `graph` return those of its `first` results that it would only wait for; the caller waits then.

    A loss summed over the ranks is of no use to the backward pass, which need not wait until all ranks are there.
    """
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    found = []
    for index, result in enumerate(results[:first]):
        waits = isinstance(result, fx.Node) and result.target is c10d.wait_tensor.default
        if waits and len(result.users) == 1 and results.count(result) == 1:
            found.append(index)
    waits_of = {index: results[index] for index in found}
    graph.output_node().args = (tuple(waits_of[i].args[0] if i in waits_of else r for i, r in enumerate(results)),)
    for node in waits_of.values():
        graph.erase_node(node)
    return tuple(found)


def wait_for(tensor: torch.Tensor) -> torch.Tensor:
    """The result of a collective, arrived."""
    waited: torch.Tensor = c10d.wait_tensor.default(tensor)
    return waited


class RankProgram:
    """The executable form of an `EmittedProgram` on one rank.

    group_names: the process group of each mesh axis. coordinates: this rank's place on each axis
    (ints; symbolic ints when all ranks run in one process).
    """

    def __init__(self, emitted: EmittedProgram, group_names: Sequence[str], coordinates: Sequence[Any]) -> None:
        self.emitted = emitted
        self.coordinates = list(coordinates)
        self.group_names = tuple(group_names)
        forward = bind_groups(emitted.forward, group_names)
        self.under_way = hand_out_early(forward, emitted.whole_outputs)
        put_channels_innermost(forward, results=len(emitted.output_names))
        backward = bind_groups(emitted.backward, group_names)
        put_channels_innermost(backward, results=len(emitted.grads))
        self.folded_forward = fold(forward)
        self.folded_backward = fold(backward)

    @cached_property
    def forward_module(self) -> fx.GraphModule:
        """The forward pass op by op, no layer folded."""
        return _boxed(bind_groups(self.emitted.forward, self.group_names))

    @cached_property
    def backward_module(self) -> fx.GraphModule:
        """The backward pass op by op, no layer folded."""
        return _boxed(bind_groups(self.emitted.backward, self.group_names))

    def forward(
        self, values: dict[str, torch.Tensor], *, wait: bool = True
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run the forward pass.

        values: local tensor per joint-graph placeholder. Returns the outputs (the whole ones first; in the
        order of `emitted.output_names`) and the saved tensors. With `wait` false the results numbered in
        `under_way` may still be on their way (`wait_for`).
        """
        inputs = [*self.coordinates, *(values[name] for name in self.emitted.forward_inputs)]
        results = self.folded_forward(inputs)
        if wait:
            for index in self.under_way:
                results[index] = wait_for(results[index])
        count = len(self.emitted.output_names)
        return results[:count], results[count:]

    def backward(self, saved: list[torch.Tensor], values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Run the backward pass; returns local gradients in the order of `emitted.grads`. Empties `saved`.

        values: as in `forward`, and the tangents.
        """
        versions: dict[Version, torch.Tensor] = dict(zip(self.emitted.saved, saved, strict=True))
        saved.clear()
        inputs: list[Any] = list(self.coordinates)
        for version in self.emitted.backward_inputs:
            inputs.append(versions.pop(version) if version in versions else values[version[0]])
        return self.folded_backward(inputs)


def _boxed(graph: fx.Graph) -> fx.GraphModule:
    graph.set_codegen(boxed_codegen())
    return fx.GraphModule(torch.nn.Module(), graph)
