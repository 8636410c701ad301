"""Rules of ops that read or write at computed places: index, gather, scatter and their like."""

from __future__ import annotations

import math

import torch

from autopar.placements import PARTIAL, REPLICATE, Placement, shard
from autopar.rules.schema import OpCall, aligned, normalized
from autopar.rules.types import AxisRule


def gather(call: OpCall) -> list[AxisRule]:
    """(self, index): other dims together where their sizes agree; along its own dim any part of the index."""
    source, index = call.inputs
    dim = normalized(call.arg("dim"), source.dim())
    rules = [
        call.rule({"self": shard(d), "index": shard(d)}, shard(d))
        for d in range(index.dim())
        if d != dim and source.shape[d] == index.shape[d]
    ]
    # The result at an index position depends on that position only, as long as the other dims are whole.
    return [*rules, call.rule({"index": shard(dim)}, shard(dim))] if index.dim() else rules


def scatter(call: OpCall) -> list[AxisRule]:
    """scatter, scatter_add, scatter_reduce (self, index, src or value): dims but its own, where all sizes agree."""
    sizes = [t.shape for t in call.inputs if t.dim()]
    dim = normalized(call.arg("dim"), call.out.dim())
    return [
        AxisRule(tuple(shard(d) if t.dim() else REPLICATE for t in call.inputs), (shard(d),))
        for d in range(call.out.dim())
        if d != dim and len({s[d] for s in sizes}) == 1
    ]


def index_along(call: OpCall) -> list[AxisRule]:
    """index_add, index_copy, index_fill (self, dim, index, source): every dim but the indexed one.

    What is added along the dim may be cut as well: each rank adds its part to a summand.
    """
    rank = call.out.dim()
    dim = normalized(call.arg("dim"), rank)
    rules = [call.rule({"self": shard(d), "source": shard(d)}, shard(d)) for d in range(rank) if d != dim]
    if call.name == "aten.index_add":
        rules.append(call.rule({"self": PARTIAL, "index": shard(0), "source": shard(dim)}, PARTIAL))
    return rules


class _Indexed:
    """How the dims of self[indices] come from those of self and of the (broadcast) index tensors.

    placed: where the index dims begin among the dims of the result; kept: (dim of self, dim of the result)
    for dims that are not indexed. None where an index is a mask, whose result has a size that depends on data.
    """

    def __init__(self, call: OpCall) -> None:
        indices = call.arg("indices")
        source = call.tensor("self")
        assert source is not None
        self.used = [i for i, t in enumerate(indices) if t is not None]
        tensors = [indices[i] for i in self.used]
        self.is_known = all(t.dtype not in (torch.bool, torch.uint8) for t in tensors)
        self.shape = torch.broadcast_shapes(*(t.shape for t in tensors)) if self.is_known else ()
        together = self.used == list(range(self.used[0], self.used[-1] + 1))
        self.placed = self.used[0] if together else 0
        rest = [d for d in range(source.dim()) if d not in self.used]
        made = [d for d in range(len(rest) + len(self.shape)) if not 0 <= d - self.placed < len(self.shape)]
        self.kept = list(zip(rest, made, strict=True))

    def cut(self, call: OpCall, dim: int) -> list[Placement]:
        """The placements of the index tensors where dim `dim` of their broadcast shape is cut."""
        tensors = [t for t in call.arg("indices") if t is not None]
        offsets = [len(self.shape) - t.dim() for t in tensors]
        return [
            shard(dim - o) if dim >= o and t.shape[dim - o] == self.shape[dim] else REPLICATE
            for t, o in zip(tensors, offsets, strict=True)
        ]


def index(call: OpCall) -> list[AxisRule]:
    """(self, indices): dims of self that are not indexed, and any dim of the index tensors."""
    how = _Indexed(call)
    if not how.is_known:
        return []
    rules = [call.rule({"self": shard(d)}, shard(made)) for d, made in how.kept]
    for dim in range(len(how.shape)):
        rules.append(AxisRule((REPLICATE, *how.cut(call, dim)), (shard(how.placed + dim),)))
    return rules


def index_put(call: OpCall) -> list[AxisRule]:
    """(self, indices, values, accumulate): dims of self that are not indexed.

    With accumulation any dim of the index tensors too: each rank adds its part to a summand.
    """
    how, values = _Indexed(call), call.tensor("values")
    if not how.is_known or values is None:
        return []
    like = torch.empty(_result_shape(call, how), device="meta")
    whole = [REPLICATE] * len(how.used)
    rules = []
    for dim, made in how.kept:
        rules.append(AxisRule((shard(dim), *whole, aligned(shard(made), values, like)), (shard(dim),)))
    if call.arg("accumulate"):
        for dim in range(len(how.shape)):
            cut = aligned(shard(how.placed + dim), values, like)
            rules.append(AxisRule((PARTIAL, *how.cut(call, dim), cut), (PARTIAL,)))
    return rules


def _result_shape(call: OpCall, how: _Indexed) -> list[int]:
    """The shape of self[indices]."""
    source = call.tensor("self")
    assert source is not None
    shape = [0] * (len(how.kept) + len(how.shape))
    for dim, made in how.kept:
        shape[made] = int(source.shape[dim])
    shape[how.placed : how.placed + len(how.shape)] = map(int, how.shape)
    return shape


def bucketize(call: OpCall) -> list[AxisRule]:
    """(self, boundaries): any dim of what is sorted in."""
    return [call.rule({"self": shard(d)}, shard(d)) for d in range(call.out.dim())]


def histogram(call: OpCall) -> list[AxisRule]:
    """histc with given bounds: each rank counts its part."""
    low, high = call.arg("min", 0), call.arg("max", 0)
    if not low < high or math.isinf(low) or math.isinf(high):
        return []
    return [call.rule({"self": shard(d)}, PARTIAL) for d in range(call.inputs[0].dim())]


INDEXING = {
    "aten.gather": gather,
    "aten.scatter": scatter,
    "aten.scatter_add": scatter,
    "aten.scatter_reduce": scatter,
    "aten.index_add": index_along,
    "aten.index_copy": index_along,
    "aten.index_fill": index_along,
    "aten.index": index,
    "aten._unsafe_index": index,
    "aten.index_put": index_put,
    "aten._unsafe_index_put": index_put,
    "aten.bucketize": bucketize,
    "aten.histc": histogram,
}
