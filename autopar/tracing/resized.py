"""A three-layer trace for another batch, from a two-layer one.

`three` was traced with one batch, `two` with another and one layer less. If three layers, unrolled to two, are op by op
what `two` is, and differ from it only in sizes that follow the batch, both are proven at once: that the trace unrolls
to any depth (`autopar.tracing.unroll`), and what three layers are with the other batch. Tracing them would give
just this, at the price of one capture more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from autopar._torch_compat import graph_module, pytree
from autopar.tracing.assemble import KEPT_META
from autopar.tracing.types import Trace, graph_hash
from autopar.tracing.unroll import Template, two_layers

_Pairs = Mapping[fx.Node, fx.Node]


def resized(template: Template, two: Trace) -> Trace | None:
    """The three layers of a template with the batch of `two`; None where `two` is not what they are."""
    found, batches = two_layers(template), (_batch_of(template.trace), _batch_of(two))
    if found is None or batches[0] is None or batches[1] is None:
        return None
    shorter, stands_for = found
    ours, theirs = (list(t.graph_module.graph.nodes) for t in (shorter, two))
    follows = _Follows(batches[0], batches[1])
    if len(ours) != len(theirs) or not all(map(follows.node, ours, theirs)):
        return None
    if len(shorter.outputs) != len(two.outputs) or len(shorter.constants) != len(two.constants):
        return None
    pair = dict(zip(ours, theirs, strict=True))
    if graph_hash(_dressed(shorter, pair, two)) != graph_hash(two):
        return None
    of_three = {node: pair[stands_for[node]] for node in stands_for}
    return _dressed(template.trace, of_three, two)


def _batch_of(trace: Trace) -> int | None:
    return next((i.shape[0] for i in trace.inputs if i.batch_dim == 0), None)


@dataclass(frozen=True)
class _Follows:
    """Whether what stands in a graph for a batch of `here` is, for a batch of `there`, what stands in another."""

    here: int
    there: int

    def node(self, ours: fx.Node, theirs: fx.Node) -> bool:
        """All but which nodes these refer to."""
        if ours.op != theirs.op or (ours.op == "call_function" and ours.target is not theirs.target):
            return False
        if ours.meta.get("phase") != theirs.meta.get("phase"):
            return False
        return self._alike((ours.args, ours.kwargs), (theirs.args, theirs.kwargs)) and self._alike(
            ours.meta.get("val"), theirs.meta.get("val")
        )

    def _alike(self, ours: Any, theirs: Any) -> bool:
        mine, spec = pytree.tree_flatten(ours)
        other, other_spec = pytree.tree_flatten(theirs)
        return spec == other_spec and all(map(self._leaf, mine, other))

    def _leaf(self, x: Any, y: Any) -> bool:
        if isinstance(x, fx.Node):
            return isinstance(y, fx.Node)
        if type(x) is not type(y):
            return False
        if isinstance(x, torch.Tensor):
            same_kind = x.dtype == y.dtype and x.device == y.device and x.dim() == y.dim()
            return same_kind and all(map(self._leaf, (*x.shape, *x.stride()), (*y.shape, *y.stride())))
        if isinstance(x, float):  # a mean divides by the batch
            grown = (x * self.there, y * self.here), (x * self.here, y * self.there)
            return x == y or any(math.isclose(a, b, rel_tol=1e-12) for a, b in grown)
        if isinstance(x, int) and not isinstance(x, bool):
            return x == y or x * self.there == y * self.here
        return bool(x == y)


def _dressed(trace: Trace, pair: _Pairs, source: Trace) -> Trace:
    """The same graph with the sizes and numbers of other nodes: `pair` says of which, `source` is what they are in."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in trace.graph_module.graph.nodes:
        other = pair.get(node, node)
        mine, spec = pytree.tree_flatten((node.args, node.kwargs))
        if node.op == "output":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
        else:
            numbers = pytree.tree_leaves((other.args, other.kwargs))
            leaves = [copies[a] if isinstance(a, fx.Node) else b for a, b in zip(mine, numbers, strict=True)]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
        copies[node] = copy = graph.create_node(node.op, node.target, args, kwargs, node.name)
        copy.meta = {k: v for k, v in node.meta.items() if k in KEPT_META} | {"val": other.meta.get("val")}
    made = {n.name: n for n in graph.nodes}
    graph.output_node().meta["val"] = tuple(made[name].meta["val"] for name in trace.results)
    constants = (
        replace(a, shape=b.shape, value=b.value) for a, b in zip(trace.constants, source.constants, strict=True)
    )
    outputs = (replace(a, value=b.value) for a, b in zip(trace.outputs, source.outputs, strict=True))
    return replace(
        trace,
        graph_module=graph_module(trace.graph_module, graph, "JointGraph"),
        constants=tuple(constants),
        inputs=tuple(replace(a, shape=b.shape) for a, b in zip(trace.inputs, source.inputs, strict=True)),
        fixed_inputs=source.fixed_inputs,
        outputs=tuple(outputs),
        out_spec=source.out_spec,
        twins={},
    )
