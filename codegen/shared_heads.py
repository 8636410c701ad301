"""Attention of ranks that share a head of keys (`autopar.rules.shared_heads`)."""

from __future__ import annotations

import operator

from torch import fx

from autopar.codegen.shards import LowerContext, Results, Shards, aten
from autopar.rules import AxisRule
from autopar.rules.shared_heads import SHARED_HEADS, SHARED_HEADS_BACKWARD

__all__ = ["SHARED_HEADS", "SHARED_HEADS_BACKWARD", "shared_heads", "shared_heads_backward"]


def shared_heads(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """-> (out, logsumexp) of this rank's queries."""
    op = Shards(ctx, node, rules, operands)
    first = _head(op)
    return op.call({name: _taken(op, name, first) for name in ("key", "value")})


def shared_heads_backward(
    ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]
) -> Results:
    """-> gradients; those of other key heads than this rank's are 0."""
    op = Shards(ctx, node, rules, operands)
    first = _head(op)
    query, *others = op.call({name: _taken(op, name, first) for name in ("key", "value")})
    last = ctx.call(operator.add, first, 1)
    shapes = (op.result_shape(1), op.result_shape(2))
    grads = [
        None if g is None else ctx.call(aten.slice_backward.default, g, list(shape), 1, first, last, 1)
        for g, shape in zip(others, shapes, strict=True)
    ]
    return (query, *grads)


def _head(op: Shards) -> fx.Node:
    """Which of the key heads at hand this rank's queries read, an int node."""
    call = op.ctx.call
    query, key = op.slot("query"), op.slot("key")
    group = op.traced.inputs[query].shape[1] // op.traced.inputs[key].shape[1]
    head = call(operator.floordiv, op.offset(op.axes(query, 1), op.operand_shape(query)[1]), group)
    held = op.axes(key, 1)
    return call(operator.sub, head, op.offset(held, op.operand_shape(key)[1])) if held else head


def _taken(op: Shards, name: str, first: fx.Node) -> fx.Node:
    call = op.ctx.call
    return call(aten.slice.Tensor, op.operands[op.slot(name)], 1, first, call(operator.add, first, 1))
