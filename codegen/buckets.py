"""Gradient reductions, several at a time.

Gradients whose conversion takes the same steps (same kinds, axes and dims up to layout)
are collected until a bucket is full and then converted together, one collective per step
for the whole bucket: fewer, larger messages (Li et al. 2020, "PyTorch Distributed").
Reduce-scatters and all-gathers go out as one collective on the concatenation of the
members, all-reduces as one coalesced collective: NCCL sends the members from where they
are. gloo would copy them into one buffer and back; on CPUs all-reduces take the
concatenation, too, and gradients are computed straight into it (`autopar.codegen.flat`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from autopar.codegen.builder import GraphBuilder, c10d, group_token, nbytes
from autopar.codegen.flat import writes_anywhere
from autopar.codegen.steps import blocks_from_front, blocks_to_front, emit_path, required
from autopar.redistribute import Step

aten = torch.ops.aten
Done = Callable[[fx.Node], object]
# On CPUs, a gradient that cannot be computed into the buffer of a bucket travels alone from this size on: over loopback
# gloo's all-reduce costs 0.35 ms a message (see the "cpu" preset), as much as the copy of a MiB.
_WORTH_NO_COPY = 1 << 20
_Signature = tuple[tuple[tuple[str, int], ...], torch.dtype]


@dataclass
class _Bucket:
    nbytes: int = 0
    members: list[tuple[fx.Node, Sequence[Step], Done]] = field(default_factory=list)
    kinds: set[str | None] = field(default_factory=set)

    def ends_before(self, kind: str | None) -> bool:
        """Whether with a gradient of this kind a layer begins, or the layers or what is outside of them end."""
        return (kind is None) != (None in self.kinds) or (kind is not None and kind in self.kinds)


class GradientBuckets:
    """Collects conversions of gradients and emits them bucket by bucket.

    by_layer: a bucket also ends where a layer begins or ends, so that the code of all layers is alike (and written
        once, see `autopar.codegen.fold`).
    """

    def __init__(self, builder: GraphBuilder, bucket_bytes: int, by_layer: bool = False) -> None:
        self.builder, self.bucket_bytes, self.by_layer = builder, bucket_bytes, by_layer
        self._open: dict[_Signature, _Bucket] = {}

    def add(self, source: fx.Node, path: Sequence[Step], done: Done, kind: str | None) -> None:
        """Convert `source` along `path` now or a little later; `done` gets the result.

        kind: the same for the gradients of the same parameter of all layers; None outside of layers.
        """
        tensor = source.meta["val"]
        if tensor.device.type == "cpu" and nbytes(tensor) >= _WORTH_NO_COPY and not self._needs_no_copy(source, path):
            done(emit_path(self.builder, source, path, keep_source_alive=False))
            return
        signature = (tuple((s.kind, s.axis) for s in path), tensor.dtype)
        if self.by_layer and signature in self._open and self._open[signature].ends_before(kind):
            self._flush(self._open.pop(signature))
        bucket = self._open.setdefault(signature, _Bucket())
        bucket.kinds.add(kind)
        bucket.members.append((source, path, done))
        bucket.nbytes += nbytes(tensor)
        if bucket.nbytes >= self.bucket_bytes:
            self._flush(self._open.pop(signature))

    @staticmethod
    def _needs_no_copy(source: fx.Node, path: Sequence[Step]) -> bool:
        return path[0].kind == "all_reduce" and writes_anywhere(source)

    def flush_all(self) -> None:
        """Emit what is still waiting."""
        for signature in list(self._open):
            self._flush(self._open.pop(signature))

    def _flush(self, bucket: _Bucket) -> None:
        nodes = [source for source, _, _ in bucket.members]
        if len(nodes) == 1:
            source, path, done = bucket.members[0]
            done(emit_path(self.builder, source, path, keep_source_alive=False))
            return
        for steps in zip(*(path for _, path, _ in bucket.members), strict=True):
            nodes = self._emit_step(nodes, steps)
        for node, (_, _, done) in zip(nodes, bucket.members, strict=True):
            done(node)

    def _emit_step(self, nodes: list[fx.Node], steps: tuple[Step, ...]) -> list[fx.Node]:
        emitters = {
            "all_reduce": self._all_reduce,
            "reduce_scatter": self._reduce_scatter,
            "all_gather": self._all_gather,
        }
        emitter = emitters.get(steps[0].kind)
        if emitter is None or any(step.folded_dim is not None for step in steps):
            pairs = zip(nodes, steps, strict=True)
            return [emit_path(self.builder, n, [s], keep_source_alive=False) for n, s in pairs]
        return emitter(nodes, steps)

    def _all_reduce(self, nodes: list[fx.Node], steps: tuple[Step, ...]) -> list[fx.Node]:
        call = self.builder.call
        if nodes[0].meta["val"].device.type == "cpu":
            return self._all_reduce_flat(nodes, steps[0].axis)
        inputs = [self.builder.contiguous(n) for n in nodes]
        started = call(c10d.all_reduce_coalesced.default, inputs, "sum", group_token(steps[0].axis))
        return [call(c10d.wait_tensor.default, call(operator.getitem, started, i)) for i in range(len(nodes))]

    def _all_reduce_flat(self, nodes: list[fx.Node], axis: int) -> list[fx.Node]:
        flat = self.builder.call(aten.cat.default, [self.builder.reshape(n, [-1]) for n in nodes], 0)
        tensors = [n.meta["val"] for n in nodes]
        pieces = self._split(self.builder.all_reduce(flat, axis), [t.numel() for t in tensors], 0)
        return [self.builder.reshape(x, t.shape) for x, t in zip(pieces, tensors, strict=True)]

    def _reduce_scatter(self, nodes: list[fx.Node], steps: tuple[Step, ...]) -> list[fx.Node]:
        builder, parts = self.builder, steps[0].parts
        fronts = [blocks_to_front(builder, n, required(s.target_dim), parts) for n, s in zip(nodes, steps, strict=True)]
        rows = [builder.reshape(f, [parts, -1]) for f in fronts]
        flat = builder.reshape(builder.call(aten.cat.default, rows, 1), [-1])
        shards = self._split(builder.reduce_scatter(flat, steps[0].axis), [r.meta["val"].shape[1] for r in rows], 0)
        shapes = [[f.meta["val"].shape[0] // parts, *f.meta["val"].shape[1:]] for f in fronts]
        return [builder.reshape(x, shape) for x, shape in zip(shards, shapes, strict=True)]

    def _all_gather(self, nodes: list[fx.Node], steps: tuple[Step, ...]) -> list[fx.Node]:
        builder, parts = self.builder, steps[0].parts
        sizes = [math.prod(n.meta["val"].shape) for n in nodes]
        flat = builder.call(aten.cat.default, [builder.reshape(n, [-1]) for n in nodes], 0)
        rows = builder.reshape(builder.all_gather(flat, steps[0].axis), [parts, -1])
        gathered = []
        for node, step, columns in zip(nodes, steps, self._split(rows, sizes, 1), strict=True):
            shape = node.meta["val"].shape
            front = builder.reshape(columns, [parts * shape[0], *shape[1:]])
            gathered.append(blocks_from_front(builder, front, required(step.source_dim), parts))
        return gathered

    def _split(self, x: fx.Node, sizes: list[int], dim: int) -> list[fx.Node]:
        pieces, start = [], 0
        for size in sizes:
            pieces.append(self.builder.call(aten.slice.Tensor, x, dim, start, start + size))
            start += size
        return pieces
