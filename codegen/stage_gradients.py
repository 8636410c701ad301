"""Gradients of a cut program: whose summands several stages have, and what of their reduction waits for the step's end.

A parameter that several stages use (tied embeddings) has a gradient that is a sum; each stage keeps its own summand as
its own gradient, so that none of them travels with every micro-batch. And as conversions between states are linear,
the summands of all micro-batches are added up first and converted once.
"""

from __future__ import annotations

import torch
from torch import fx

from autopar._torch_compat import OpOverload
from autopar.codegen.builder import c10d, is_collective
from autopar.codegen.stage_demand import LocalStages
from autopar.rules import is_view

aten = torch.ops.aten

# What conversions are made of (`autopar.codegen.steps`) beside views: all of it linear, and exact in any dtype.
_CARRIERS = (aten.clone.default, aten.reshape.default, c10d.wait_tensor.default)
_CASTS = (aten._to_copy.default, torch.ops.prims.convert_element_type.default)
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
    chain, top = linear_chain(node, widenings=True)
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


def linear_chain(node: fx.Node, *, widenings: bool = False) -> tuple[list[fx.Node], fx.Node]:
    """The views and conversions at the end of a gradient, last first, and what they begin with.

    widenings: go through casts to a wider dtype, too (of autocast). They are linear, but what is added up over
    micro-batches is added up in the wider dtype: the sum of summands may be taken apart below them, that of
    micro-batches not.
    """
    chain = []
    while (source := carried(node) or (_widened(node) if widenings else None)) is not None:
        chain.append(node)
        node = source
    return chain, node


def _widened(node: fx.Node) -> fx.Node | None:
    """What a cast to a wider floating dtype takes; None if a node is none."""
    if node.target not in _CASTS:
        return None
    (source,) = (i for i in node.all_input_nodes if isinstance(i.meta["val"], torch.Tensor))
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    wider = before.is_floating_point and after.is_floating_point and after.itemsize > before.itemsize
    return source if wider else None


def carried(node: fx.Node) -> fx.Node | None:
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
    """What is to be added up over micro-batches in place of a gradient: the operand of its first collective, but for
    those whose result each micro-batch's backward pass takes as well."""
    chain, _ = linear_chain(gradient)
    found = gradient
    for at, link in enumerate(chain):
        if any(set(one.users) - {*chain, gradient.graph.output_node()} for one in chain[: at + 1]):
            break
        if is_collective(link):
            found = next(i for i in link.all_input_nodes if isinstance(i.meta["val"], torch.Tensor))
    return found
