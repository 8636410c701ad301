"""Computes the members of a concatenation where they will lie in it.

The graphs come out functional: tensors that travel together are concatenated, which reads
and writes all of them once more. Here the buffer is made before its first member. A
matrix product, a sum or an addition writes its result straight into its part of the
buffer; any other member is copied there as soon as it exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.codegen.builder import call_in

aten = torch.ops.aten

# Ops whose kernel fills any dense tensor that it is given, and what does that: the same numbers, no copy.
_INTO: dict[Any, Any] = {
    aten.mm.default: aten.mm.out,
    aten.bmm.default: aten.bmm.out,
    aten.sum.dim_IntList: aten.sum.IntList_out,
    aten.add.Tensor: aten.add.out,
    aten.mul.Tensor: aten.mul.out,
}


def writes_anywhere(node: fx.Node) -> bool:
    """Whether an op can compute its result into a part of a larger buffer."""
    return node.target in _INTO and bool(node.meta["val"].is_contiguous())


def fill_in_place(graph: fx.Graph) -> None:
    """Let every concatenation into one row be filled member by member, if any of its members need not be copied."""
    for cat in graph.find_nodes(op="call_function", target=aten.cat.default):
        members, *dim = cat.args
        if cat.meta["val"].dim() == 1 and dim in ([], [0]):
            sources = [_source(m) for m in members]
            moves = [_moves(m, s) for m, s in zip(members, sources, strict=True)]
            if any(moves) and all(_fits(s, cat) for s in sources):
                _fill(graph, cat, sources, moves)
    graph.lint()


def _source(member: fx.Node) -> fx.Node:
    """What a member is a reshaped view of; itself, if it is none."""
    if member.target is not aten.reshape.default:
        return member
    source = member.all_input_nodes[0]
    return source if source.meta["val"].is_contiguous() else member


def _moves(member: fx.Node, source: fx.Node) -> bool:
    """Whether a member can be computed where it will lie: made by such an op, and for the concatenation alone."""
    return writes_anywhere(source) and len(source.users) == len(member.users) == 1


def _fits(source: fx.Node, cat: fx.Node) -> bool:
    return source.op == "call_function" and source.meta["val"].dtype == cat.meta["val"].dtype


def _fill(graph: fx.Graph, cat: fx.Node, sources: list[fx.Node], moves: list[bool]) -> None:
    """Make the buffer and its parts before the first member, and have each member put where it belongs."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    made = cat.meta["val"]
    with graph.inserting_before(min(sources, key=order.__getitem__)):
        flat = _call(graph, cat, aten.empty.memory_format, [made.numel()], dtype=made.dtype, device=made.device)
        parts = _parts(graph, flat, sources)
    for source, part, move in zip(sources, parts, moves, strict=True):
        if move:
            source.target, source.kwargs = _INTO[source.target], {**source.kwargs, "out": part}
            source.meta["val"] = part.meta["val"]
        else:
            with graph.inserting_after(source):
                _call(graph, source, aten.copy_.default, part, source)
    members = dict.fromkeys(cat.all_input_nodes)
    cat.replace_all_uses_with(flat)
    graph.erase_node(cat)
    for member in members:
        if member not in sources and not member.users:
            graph.erase_node(member)


def _parts(graph: fx.Graph, flat: fx.Node, sources: list[fx.Node]) -> list[fx.Node]:
    """Each member's part of the buffer, in the shape in which it is written."""
    found, start = [], 0
    for source in sources:
        shape = source.meta["val"].shape
        end = start + shape.numel()
        part = _call(graph, source, aten.slice.Tensor, flat, 0, start, end)
        found.append(_call(graph, source, aten.view.default, part, list(shape)) if len(shape) != 1 else part)
        start = end
    return found


def _call(graph: fx.Graph, origin: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    node = call_in(graph, origin.meta["val"].fake_mode, target, *args, **kwargs)
    node.meta["origin"] = origin.meta.get("origin", origin.name)
    return node
