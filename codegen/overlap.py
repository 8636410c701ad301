"""Lets collectives overlap with compute: issued early, waited for late.

A collective is issued right after its operand exists, but not before the collective in
front of it has been waited for by compute (so one is in flight while the ops of the
previous one run: a prefetch of one). A wait moves down to the first use of its result,
but no further than the start of the second collective after it, so that the buffers of
at most two collectives are held. What follows from whole numbers of the batch alone, as
how many labels count, is agreed on first of all. Otherwise the order of the collectives
does not change; it is the same on all ranks, as the graph is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from autopar.codegen.builder import c10d, is_collective
from autopar.codegen.repeats import last_touches

_IN_FLIGHT = 2
_MOST_OPS = 24  # that a number of the batch takes: what it takes is held from the start on


def overlap(graph: fx.Graph) -> None:
    """Reorder starts and waits of `graph` in place."""
    sink_views(graph)
    first = agree_first(graph)
    sink_waits(graph, first)
    hoist_starts(graph, first)
    graph.lint()


def agree_first(graph: fx.Graph) -> list[fx.Node]:
    """Move single numbers that follow from the batch's whole numbers alone, and their reductions, to the start.

    Returns the reductions. Nothing else need wait for them: they are a few bytes, on their way during all that follows.
    """
    found: list[fx.Node] = []
    moved = set[fx.Node]()
    for start in [n for n in graph.nodes if is_collective(n)]:
        value = start.meta["val"]
        needed = _made_of(start) if isinstance(value, torch.Tensor) and value.dim() == 0 else None
        if needed is None:
            continue
        anchor = found[-1] if found else [n for n in graph.nodes if n.op == "placeholder"][-1]
        to_move = needed - moved
        for node in [n for n in graph.nodes if n in to_move]:
            anchor.append(node)
            anchor = node
        moved |= needed
        found.append(start)
    return found


def _made_of(start: fx.Node) -> set[fx.Node] | None:
    """A reduction and all ops that it takes; None if they read other than whole numbers, draw, or are many."""
    needed, open_ends = set[fx.Node](), [start]
    while open_ends:
        node = open_ends.pop()
        if node.op == "placeholder":
            value = node.meta["val"]
            if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
                return None
            continue
        if node is not start and (is_collective(node) or _is_random(node)):
            return None
        needed.add(node)
        if len(needed) > _MOST_OPS:
            return None
        open_ends += [n for n in node.all_input_nodes if n not in needed]
    return needed


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def sink_views(graph: fx.Graph) -> None:
    """Move the slices and reshapes of what the graph returns to its end: a wait need not come before that for them."""
    last = last_touches(graph)
    for node in [n for n in graph.nodes if n in last and n.target is not c10d.wait_tensor.default]:
        graph.output_node().prepend(node)


def sink_waits(graph: fx.Graph, first: Sequence[fx.Node] = ()) -> None:
    """Move each wait to right before the first use of its result (or the start of a later collective).

    first: collectives of single numbers, which hold next to nothing.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    starts = [n for n in graph.nodes if is_collective(n)]
    position = {node: i for i, node in enumerate(starts)}
    for wait in [n for n in graph.nodes if n.target is c10d.wait_tensor.default]:
        start = _start_of(wait)
        stops = [min(wait.users, key=lambda u: order[u])] if wait.users else []
        later = position[start] + _IN_FLIGHT
        if start not in first and later < len(starts):
            stops.append(starts[later])
        if stops:
            stop = min(stops, key=lambda n: order[n])
            if order[stop] > order[wait]:
                stop.prepend(wait)


def hoist_starts(graph: fx.Graph, first: Sequence[fx.Node] = ()) -> None:
    """Move each start up to where its operands exist, but not above the previous collective's first wait.

    first: collectives that the others need not wait for, only follow.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    floor: fx.Node | None = None
    for start in [n for n in graph.nodes if is_collective(n)]:
        if start in first:
            floor = start
            continue
        before = [n for n in start.all_input_nodes if n.op != "placeholder"]
        last_placeholder = [n for n in graph.nodes if n.op == "placeholder"][-1:]
        anchors = before + ([floor] if floor is not None else []) + last_placeholder
        anchor = max(anchors, key=lambda n: order[n])
        if order[anchor] + 1 < order[start]:
            anchor.append(start)
            order = {node: i for i, node in enumerate(graph.nodes)}
        waits = _waits_of(start)
        floor = min(waits, key=lambda n: order[n]) if waits else start


def _start_of(wait: fx.Node) -> fx.Node:
    source = wait.all_input_nodes[0]
    return source if is_collective(source) else source.all_input_nodes[0]


def _waits_of(start: fx.Node) -> list[fx.Node]:
    reached = [start, *start.users]
    return [u for n in reached for u in n.users if u.target is c10d.wait_tensor.default]
