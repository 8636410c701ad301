"""The graph that ends a step: sums over micro-batches become gradients as their parameters are stored.

The links of a gradient are those of the emitted program, in their order. Sums over ranks of several gradients go out
together (`codegen/buckets.py`), as everywhere else: a stage has few gradients, and each message costs a start.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from autopar.codegen.buckets import GradientBuckets
from autopar.codegen.builder import GROUP_PREFIX, GraphBuilder, c10d, is_collective
from autopar.codegen.stage_gradients import carried
from autopar.placements import PARTIAL, replicated
from autopar.redistribute import Step


@dataclass
class _Way:
    """A gradient on its way: where it is, and the links that are left."""

    at: fx.Node
    left: list[fx.Node]


def write_reductions(
    builder: GraphBuilder, sources: Mapping[str, fx.Node], gradients: Mapping[str, fx.Node], bucket_bytes: int
) -> None:
    """The graph that turns the sums of `sources` (nodes of the backward graph) into gradients, in the same order.

    bucket_bytes: of gradients that are summed over the ranks of an axis by one message; 0: each by its own.
    """
    env: dict[fx.Node, fx.Node] = {}
    starts = {fqn: builder.placeholder(fqn.replace(".", "_"), node.meta["val"]) for fqn, node in sources.items()}
    ways = [_Way(starts[fqn], _links(source, gradients[fqn])) for fqn, source in sources.items()]
    while any(way.left for way in ways):
        for way in ways:
            _advance(builder, way, env)
        buckets = GradientBuckets(builder, bucket_bytes)
        for way in (w for w in ways if w.left):
            axis = int(str(way.left[0].args[2]).removeprefix(GROUP_PREFIX))
            buckets.add(way.at, [_summed(builder, axis)], _arrive(way), None)
        buckets.flush_all()
    builder.output([way.at for way in ways])


def _summed(builder: GraphBuilder, axis: int) -> Step:
    whole = replicated(len(builder.mesh))
    parts = (*whole[:axis], PARTIAL, *whole[axis + 1 :])
    return Step("all_reduce", axis, parts, whole, 0, builder.mesh[axis])


def _arrive(way: _Way) -> Callable[[fx.Node], None]:
    def arrive(node: fx.Node) -> None:
        way.at, way.left = node, way.left[2:]  # the sum, and the wait for it

    return arrive


def _advance(builder: GraphBuilder, way: _Way, env: dict[fx.Node, fx.Node]) -> None:
    """Go on to the next sum over ranks, or to the end."""
    while way.left and way.left[0].target is not c10d.all_reduce.default:
        link, *way.left = way.left
        for number in _numbers(link):
            env.setdefault(number, _number(builder, number, env))
        way.at = _again(builder, link, way.at, env)


def _links(source: fx.Node, gradient: fx.Node) -> list[fx.Node]:
    links = []
    while gradient is not source:
        links.append(gradient)
        before = carried(gradient)
        assert before is not None
        gradient = before
    return links[::-1]


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
