"""Emits the steps of a conversion (`autopar.redistribute`) as nodes.

Collectives work on contiguous blocks along dim 0. A dim d > 0 is brought to the front in
`size` blocks and back, which costs one local copy that the planner has priced.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from autopar.codegen.builder import GraphBuilder
from autopar.codegen.exchange import deal_all, dealt_to, lower_first, own_chunks, put_in_order, taken_back
from autopar.placements import State, is_dealt, shard_runs
from autopar.redistribute import Step

aten = torch.ops.aten


def emit_path(builder: GraphBuilder, x: fx.Node, path: Sequence[Step], *, keep_source_alive: bool) -> fx.Node:
    """Convert `x` along `path`.

    keep_source_alive: the source stays in memory anyway (a parameter, an input), so a
    slice of it may be a view; otherwise it is copied, or it would hold the source.
    """
    for step in path:
        x = _emit_step(builder, x, step)
        is_view = step.kind == "slice" and not is_dealt(step.after[step.axis])
        if is_view and not keep_source_alive:
            x = builder.call(aten.clone.default, x, memory_format=torch.contiguous_format)
        keep_source_alive = is_view and keep_source_alive
    return x


def _emit_step(builder: GraphBuilder, x: fx.Node, step: Step) -> fx.Node:
    """One step. A dim that is cut run by run is seen as two, the number of the run and the place in it."""
    source, target, folded = step.source_dim, step.target_dim, step.folded_dim
    dealt = is_dealt(step.before[step.axis]), is_dealt(step.after[step.axis])
    if folded is None:
        ragged = any(p[0] == "E" for p in step.before)
        return _EMITTERS[step.kind](builder, x, _Move(step.axis, step.parts, source, target, *dealt, ragged))
    source, target = (_unfolded(step.before, step, source), _unfolded(step.after, step, target))
    shape = list(x.meta["val"].shape)
    runs = step.runs_of(step.before, builder.mesh)
    x = builder.reshape(x, [*shape[:folded], runs, shape[folded] // runs, *shape[folded + 1 :]])
    x = _EMITTERS[step.kind](builder, x, _Move(step.axis, step.parts, source, target, *dealt))
    made = list(x.meta["val"].shape)
    return builder.reshape(x, [*made[:folded], made[folded] * made[folded + 1], *made[folded + 2 :]])


def _unfolded(state: State, step: Step, dim: int | None) -> int | None:
    """A dim of a side of a step, when the folded one is seen as two."""
    folded = required(step.folded_dim)
    return None if dim is None else dim + (dim > folded or shard_runs(state[step.axis]) > 1)


@dataclass(frozen=True)
class _Move:
    """A step on the tensor at hand: on which axis, of how many ranks, from which dim to which; is either dealt out?"""

    axis: int
    parts: int
    source_dim: int | None
    target_dim: int | None
    source_dealt: bool = False
    target_dealt: bool = False
    ragged: bool = False  # only the run knows how many rows (dim 0) there are


def _all_reduce(builder: GraphBuilder, x: fx.Node, move: _Move) -> fx.Node:
    return builder.all_reduce(x, move.axis)


def _reduce_scatter(builder: GraphBuilder, x: fx.Node, move: _Move) -> fx.Node:
    dim = required(move.target_dim)
    x = builder.call(deal_all, x, dim, move.parts) if move.target_dealt else x
    return builder.reduce_scatter(blocks_to_front(builder, x, dim, move.parts), move.axis)


def _all_gather(builder: GraphBuilder, x: fx.Node, move: _Move) -> fx.Node:
    dim = required(move.source_dim)
    x = blocks_from_front(builder, builder.all_gather(x, move.axis), dim, move.parts, ragged=move.ragged)
    return builder.call(put_in_order, x, dim, move.parts) if move.source_dealt else x


def _all_to_all(builder: GraphBuilder, x: fx.Node, move: _Move) -> fx.Node:
    source, target = required(move.source_dim), required(move.target_dim)
    x = builder.call(deal_all, x, target, move.parts) if move.target_dealt else x
    sent = blocks_to_front(builder, x, target, move.parts)
    x = blocks_from_front(builder, builder.all_to_all(sent, move.axis), source, move.parts)
    return builder.call(put_in_order, x, source, move.parts) if move.source_dealt else x


def _permute(builder: GraphBuilder, x: fx.Node, move: _Move) -> fx.Node:
    """Deal out what lies in order, or the reverse: each of the two chunks that a rank has goes to one other rank."""
    dim, coord = required(move.source_dim), builder.coord(move.axis)
    destinations = [dealt_to(move.parts, odd) for odd in (0, 1)]
    if move.source_dealt:
        x, destinations = builder.call(lower_first, x, dim, coord), [taken_back(to) for to in destinations]
    half = x.meta["val"].shape[dim] // 2
    halves = (builder.call(aten.slice.Tensor, x, dim, at, at + half) for at in (0, half))
    moved = [builder.permute(h, move.axis, to) for h, to in zip(halves, destinations, strict=True)]
    x = builder.call(aten.cat.default, moved, dim)
    return x if move.source_dealt else builder.call(lower_first, x, dim, coord)


def _slice(builder: GraphBuilder, x: fx.Node, move: _Move) -> fx.Node:
    dim = required(move.target_dim)
    if move.target_dealt:
        return builder.call(own_chunks, x, dim, builder.coord(move.axis), move.parts)
    size = x.meta["val"].shape[dim] // move.parts
    start = builder.call(operator.mul, builder.coord(move.axis), size)
    return builder.call(aten.slice.Tensor, x, dim, start, builder.call(operator.add, start, size))


_EMITTERS = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "permute": _permute,
    "slice": _slice,
}


def required(dim: int | None) -> int:
    assert dim is not None
    return dim


def blocks_to_front(builder: GraphBuilder, x: fx.Node, dim: int, parts: int) -> fx.Node:
    """[.., D, ..] -> [parts * d0, .., D / parts, ..]: block i of dim `dim` becomes block i of dim 0."""
    if dim == 0:
        return x
    shape = list(x.meta["val"].shape)
    block = shape[dim] // parts
    split = builder.reshape(x, [*shape[:dim], parts, block, *shape[dim + 1 :]])
    order = [dim, *(i for i in range(len(shape) + 1) if i != dim)]
    front = builder.contiguous(builder.call(aten.permute.default, split, order))
    return builder.reshape(front, [parts * shape[0], *shape[1:dim], block, *shape[dim + 1 :]])


def blocks_from_front(builder: GraphBuilder, x: fx.Node, dim: int, parts: int, *, ragged: bool = False) -> fx.Node:
    """The inverse: [parts * d0, .., d, ..] -> [d0, .., parts * d, ..]. ragged: only the run knows d0."""
    if dim == 0:
        return x
    shape = list(x.meta["val"].shape)
    rows = -1 if ragged else shape[0] // parts
    split = builder.reshape(x, [parts, rows, *shape[1:]])
    order = [*range(1, dim + 1), 0, *range(dim + 1, len(shape) + 1)]
    back = builder.call(aten.permute.default, split, order)
    if ragged:  # rows whose number differs between simulated ranks can be viewed there, but not reshaped
        back = builder.contiguous(back)
    return builder.reshape(back, [rows, *shape[1:dim], parts * shape[dim], *shape[dim + 1 :]])
