"""Finds stretches of an emitted graph that repeat: the same ops on the same shapes, wired alike.

Nodes become tokens (op, literals, shapes). A stretch with period p is one in which every
token equals the one p later; of the places where its turns can begin, the one is taken
where fewest values cross. Then the wiring is checked turn by turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar._torch_compat import pytree
from autopar.codegen.builder import c10d

aten = torch.ops.aten
_MIN_PERIOD = 8  # nodes: a shorter turn costs more lines to call than it saves
_MIN_SAVED = 24  # nodes
_LIGHT = (c10d.wait_tensor.default, aten.reshape.default, aten.slice.Tensor)
_PERIODS, _STARTS = 16, 6  # how many are looked at in detail


@dataclass(frozen=True)
class Loop:
    """`turns` lists of nodes: position q of every turn is the same op, wired alike.

    inputs: what the turns take from outside, one row per input: the node that each turn takes.
    slots: per position, for each operand in order: the position in the same turn, or -1 - (index of the input).
    outputs: the positions that somebody outside of their turn uses.
    """

    turns: tuple[tuple[fx.Node, ...], ...]
    inputs: tuple[tuple[fx.Node, ...], ...]
    slots: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]


def find_loops(graph: fx.Graph) -> list[Loop]:
    """Disjoint repeated stretches of a graph, in order; empty if nothing repeats."""
    last = last_touches(graph)
    nodes = [n for n in graph.nodes if n.op == "call_function" and n not in last]
    ids: dict[Any, int] = {}
    tokens = [ids.setdefault(token(n), len(ids)) for n in nodes]
    place = {node: i for i, node in enumerate(nodes)}
    found: list[Loop] = []
    segments = [(0, len(nodes))]
    while segments:
        start, end = segments.pop()
        loop = _best(nodes, tokens, place, start, end)
        if loop is not None:
            found.append(loop)
            segments += [(start, place[loop.turns[0][0]]), (place[loop.turns[-1][-1]] + 1, end)]
    return sorted(found, key=lambda loop: place[loop.turns[0][0]])


def last_touches(graph: fx.Graph) -> set[fx.Node]:
    """Waits, slices and reshapes of what the graph returns, and of nothing else: they may come at any time."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        light = node.target in _LIGHT
        if light and len(operands_in_order(node)) == 1 and all(u.op == "output" or u in found for u in node.users):
            found.add(node)
    return found


def operands_in_order(node: fx.Node) -> list[fx.Node]:
    """All nodes among the arguments, one entry for each place."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def token(node: fx.Node) -> tuple[Any, ...]:
    """What a node does: all about it but which nodes it refers to."""
    plain = fx.node.map_aggregate((node.args, node.kwargs), lambda x: "%" if isinstance(x, fx.Node) else x)
    return (node.target, repr(plain), repr(pytree.tree_map(_shape, node.meta.get("val"))))


def _shape(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.stride(), value.dtype)
    return type(value)


def _best(nodes: list[fx.Node], tokens: list[int], place: dict[fx.Node, int], start: int, end: int) -> Loop | None:
    """The loop that leaves the fewest nodes in [start, end)."""
    stretches = []
    for period in _periods(tokens, start, end):
        for first, last in _stretches(tokens, period, start, end):
            turns = (last - first) // period
            stretches.append(((turns - 1) * period, -period, first, last))
    for saved, negative, first, last in sorted(stretches, reverse=True)[:_PERIODS]:
        period = -negative
        options = [_loop(nodes, place, at, period, last) for at in _starts(nodes, place, first, last, period)]
        whole = [o for o in options if o is not None]
        if whole:
            best = max(whole, key=lambda o: (len(o.turns), -len(o.inputs) - len(o.outputs)))
            if (len(best.turns) - 1) * period >= max(_MIN_SAVED, saved // 2):
                return best
    return None


def _periods(tokens: list[int], start: int, end: int) -> list[int]:
    """Distances at which equal tokens follow each other, the most frequent first."""
    last: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for i in range(start, end):
        if tokens[i] in last:
            distances[i - last[tokens[i]]] += 1
        last[tokens[i]] = i
    common = sorted((d for d in distances if d >= _MIN_PERIOD), key=lambda d: -distances[d] * d)
    return common[:_PERIODS]


def _stretches(tokens: list[int], period: int, start: int, end: int) -> list[tuple[int, int]]:
    """[first, last) of the stretches with this period that hold two turns or more and are worth it."""
    found = []
    first = start
    for i in range(start, end - period + 1):
        if i == end - period or tokens[i] != tokens[i + period]:
            if i - first >= max(period, _MIN_SAVED):
                found.append((first, i + period))
            first = i + 1
    return found


def _starts(nodes: list[fx.Node], place: dict[fx.Node, int], first: int, last: int, period: int) -> list[int]:
    """Where the turns of a stretch may begin: where few values cross; the end of the stretch must be reached."""
    changes: Counter[int] = Counter()
    for i in range(max(0, first - period), last):
        uses = [place[u] for u in nodes[i].users if u in place and place[u] < last]
        if uses:
            changes[i + 1] += 1
            changes[max(uses) + 1] -= 1
    crossing, level = {}, 0
    for i in range(max(0, first - period), last):
        level += changes[i]
        crossing[i] = level
    middle = first + (((last - first) // period) // 2) * period
    shifts = sorted(range(min(period, (last - first) % period + period)), key=lambda s: crossing.get(middle + s, 0))
    return [first + s % period for s in shifts[:_STARTS]]


def _loop(nodes: list[fx.Node], place: dict[fx.Node, int], start: int, period: int, last: int) -> Loop | None:
    """The longest run of turns from `start` on that are wired alike; None if there are not two."""
    turns = [tuple(nodes[i : i + period]) for i in range(start, last - period + 1, period)]
    wiring = [_wiring(turn) for turn in turns]
    best = (0, 0)
    begin = 0
    for i in range(1, len(turns) + 1):
        if i == len(turns) or wiring[i] != wiring[begin]:
            best = max(best, (i - begin, -begin))
            begin = i
    count, begin = best[0], -best[1]
    if count < 2:
        return None
    return _described(turns[begin : begin + count])


def _wiring(turn: tuple[fx.Node, ...]) -> tuple[Any, ...]:
    """What every operand refers to within the turn (None: outside), and which results are used outside."""
    inside = {node: q for q, node in enumerate(turn)}
    inner = tuple(tuple(inside.get(x) for x in operands_in_order(n)) for n in turn)
    outputs = tuple(q for q, n in enumerate(turn) if any(u not in inside for u in n.users))
    return inner, outputs


def _described(turns: Sequence[tuple[fx.Node, ...]]) -> Loop | None:
    inner, outputs = _wiring(turns[0])
    rows: dict[tuple[fx.Node, ...], int] = {}
    slots = []
    for q, refs in enumerate(inner):
        operands = [operands_in_order(turn[q]) for turn in turns]
        slots.append(
            tuple(
                ref if ref is not None else -1 - rows.setdefault(tuple(o[i] for o in operands), len(rows))
                for i, ref in enumerate(refs)
            )
        )
    inside = {node: turn for turn, members in enumerate(turns) for node in members}
    if not all(_reachable(row, turns, inside) for row in rows):
        return None
    return Loop(tuple(turns), tuple(rows), tuple(slots), outputs)


def carried_position(row: Sequence[fx.Node], turns: Sequence[tuple[fx.Node, ...]]) -> int | None:
    """The position whose result of one turn the next turn takes as this input; None if the input is no such thing."""
    if row[1] not in turns[0]:
        return None
    position = turns[0].index(row[1])
    handed = all(x is turn[position] for x, turn in zip(row[1:], turns, strict=False))
    return position if handed else None


def _reachable(row: Sequence[fx.Node], turns: Sequence[tuple[fx.Node, ...]], inside: dict[fx.Node, int]) -> bool:
    """Whether an input comes from outside the loop in all turns, or from the turn before in all but the first."""
    return row[0] not in inside and (all(x not in inside for x in row) or carried_position(row, turns) is not None)
