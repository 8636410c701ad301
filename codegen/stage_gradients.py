"""Gradients of a cut program: whose summands several stages have, and what of their reduction waits for the step's end.

A parameter that several stages use (tied embeddings) has a gradient that is a sum; each stage keeps its own summand as
its own gradient, so that none of them travels with every micro-batch. And as conversions between states are linear,
the summands of all micro-batches are added up first and converted once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from autopar._torch_compat import OpOverload
from autopar.codegen.builder import GraphBuilder, c10d, is_collective
from autopar.codegen.stage_demand import LocalStages
from autopar.rules import is_view

aten = torch.ops.aten

# What conversions are made of (`autopar.codegen.steps`) beside views: all of it linear, and exact in any dtype.
_CARRIERS = (aten.clone.default, aten.reshape.default, c10d.wait_tensor.default)
_REDUCTIONS = (
    c10d.all_reduce.default,
    c10d.reduce_scatter_tensor.default,
    c10d.all_gather_into_tensor.default,
    c10d.all_to_all_single.default,
)


def split_gradients(local: LocalStages) -> list[tuple[str, int, fx.Node]]:
    """(parameter, stage, node) of every gradient, by stage; sums over stages are taken apart in the backward graph."""
    found = []
    for fqn, node in zip(local.emitted.grads, local.emitted.backward.output_node().args[0], strict=True):  # type: ignore[arg-type]
        parts = _summands(local, node)
        for stage in sorted(parts):
            found.append((fqn, stage, parts[stage]))
    return found


def _summands(local: LocalStages, node: fx.Node) -> dict[int, fx.Node]:
    """The part of a gradient that each stage makes."""
    chain, top = linear_chain(node)
    last = local.stages.count - 1
    here = local.of.get(node)
    here = last if here is None else here
    if not _is_sum(top):
        return {here: node}
    sides = [_summands(local, side) for side in top.all_input_nodes]
    if len({*sides[0], *sides[1]}) < 2:
        return {here: node}
    found: dict[int, fx.Node] = {}
    for stage in sorted({*sides[0], *sides[1]}):
        parts = [side[stage] for side in sides if stage in side]
        part = parts[0] if len(parts) == 1 else _copied(local, top, parts, stage)
        for link in reversed(chain):
            part = _copied(local, link, [part], stage)
        found[stage] = part
    return found


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors of one shape and dtype, which nobody else wants apart."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return False
    made = node.meta["val"]
    return all(i.meta["val"].shape == made.shape and i.meta["val"].dtype == made.dtype for i in node.all_input_nodes)


def _copied(local: LocalStages, node: fx.Node, operands: list[fx.Node], stage: int) -> fx.Node:
    """`node` once more, on other tensors."""
    graph = local.emitted.backward
    tensors = [i for i in node.all_input_nodes if isinstance(i.meta["val"], torch.Tensor)]
    new = dict(zip(tensors, operands, strict=True))
    with graph.inserting_before(graph.output_node()):
        made = graph.node_copy(node, lambda n: new.get(n, n))
    made.meta = {k: v for k, v in node.meta.items() if k != "version"}
    made.meta["stage"] = stage
    local.of[made] = stage
    return made


def linear_chain(node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """The views and conversions at the end of a gradient, last first, and what they begin with."""
    chain = []
    while (source := _carried(node)) is not None:
        chain.append(node)
        node = source
    return chain, node


def _carried(node: fx.Node) -> fx.Node | None:
    """The one tensor of which a node's result is a linear rearrangement or reduction; None if it is none."""
    tensors = [i for i in node.all_input_nodes if not isinstance(i.meta["val"], int)]
    if node.op != "call_function" or len(tensors) != 1:
        return None
    view = isinstance(node.target, OpOverload) and is_view(node.target)
    exchanged = node.target is aten.sum.dim_IntList and _is_received(tensors[0])
    summed = node.target in _REDUCTIONS and "max" not in node.args
    return tensors[0] if view or exchanged or summed or node.target in _CARRIERS else None


def _is_received(node: fx.Node) -> bool:
    """Whether a tensor came by an exchange of blocks (a reduce-scatter on CPUs is one, and a sum)."""
    while node.target in (aten.reshape.default, c10d.wait_tensor.default):
        (node,) = node.all_input_nodes
    return node.target is c10d.all_to_all_single.default


def summed_first(gradient: fx.Node) -> fx.Node:
    """What is to be added up over micro-batches in place of a gradient: the operand of its first collective."""
    chain, _ = linear_chain(gradient)
    starts = [link for link in chain if is_collective(link)]
    if not starts:
        return gradient
    return next(i for i in starts[-1].all_input_nodes if isinstance(i.meta["val"], torch.Tensor))


def write_reductions(builder: GraphBuilder, sources: Mapping[str, fx.Node], gradients: Mapping[str, fx.Node]) -> None:
    """The graph that turns the sums of `sources` (nodes of the backward graph) into gradients, in the same order."""
    env: dict[fx.Node, fx.Node] = {}
    starts = {fqn: builder.placeholder(fqn.replace(".", "_"), node.meta["val"]) for fqn, node in sources.items()}
    done = []
    for fqn, source in sources.items():
        at = starts[fqn]
        for link in reversed(_between(source, gradients[fqn])):
            for number in _numbers(link):
                env.setdefault(number, _number(builder, number, env))
            at = _again(builder, link, at, env)
        done.append(at)
    builder.output(done)


def _between(source: fx.Node, gradient: fx.Node) -> list[fx.Node]:
    links = []
    while gradient is not source:
        links.append(gradient)
        carried = _carried(gradient)
        assert carried is not None
        gradient = carried
    return links


def _again(builder: GraphBuilder, link: fx.Node, operand: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    builder.origin = link.meta.get("origin")
    if is_collective(link):
        operand = builder.contiguous(operand)
    new = {i: env[i] if isinstance(i.meta["val"], int) else operand for i in link.all_input_nodes}
    args, kwargs = fx.node.map_arg((link.args, link.kwargs), new.__getitem__)
    return builder.call(link.target, *args, **kwargs)  # type: ignore[arg-type]


def _numbers(node: fx.Node) -> Iterator[fx.Node]:
    """The numbers that a node takes, after those that they are computed from."""
    for operand in node.all_input_nodes:
        if isinstance(operand.meta["val"], int):
            yield from _numbers(operand)
            yield operand


def _number(builder: GraphBuilder, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    if node.op == "placeholder":  # a coordinate: the only numbers that a graph takes
        return builder.coord(int(str(node.target).removeprefix("coord")))
    assert node.target in (operator.mul, operator.add)
    args = fx.node.map_arg(node.args, env.__getitem__)
    return builder.call(node.target, *args)
