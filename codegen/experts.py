"""How rows in groups are written on a rank: the moves to groups and back, and products with a rank's own groups.

See `autopar.rules.groups` for what each placement means. An op follows at most one axis
that cuts groups ("E"); all other axes have cut its tensors already, whatever they cut.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from autopar.codegen import row_exchange as row_exchange  # defines the ops
from autopar.codegen.shards import LowerContext, Results, Shards, aten
from autopar.placements import PARTIAL
from autopar.rules import AxisRule

ops = torch.ops.autopar


def to_groups(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """The rows of a rank's tokens, or of its groups, in the order of the groups."""
    op, (x, source, ends) = Shards(ctx, node, rules, operands), operands
    axis = _expert_axis([rule.outputs[0] for rule in rules])
    if axis is None:
        return (ctx.call(aten.index_select.default, x, 0, source),)
    declared = op.result_shape()[0]
    if rules[axis].inputs[2] != PARTIAL:
        return (ctx.call(ops.own_rows.default, x, source, ends, ctx.mesh[axis], ctx.coord(axis), declared),)
    rows = ctx.call(aten.index_select.default, x, 0, source)
    received = ctx.received_counts(ends, axis)
    return (ctx.call(ops.dispatch_rows.default, rows, ends, received, declared, ctx.group(axis)),)


def from_groups(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """The other way round; a rank that only has its groups' rows makes a summand."""
    op, (rows, target, ends) = Shards(ctx, node, rules, operands), operands
    axis = _expert_axis([rule.inputs[0] for rule in rules])
    size = op.result_shape()[0]
    if axis is not None and rules[axis].inputs[2] != PARTIAL:
        arguments = (rows, target, ends, size, ctx.mesh[axis], ctx.coord(axis))
        return (ctx.call(ops.add_own_rows.default, *arguments),)
    if axis is not None:
        received = ctx.received_counts(ends, axis)
        count = op.operand_shape(op.slot("target"))[0]
        rows = ctx.call(ops.combine_rows.default, rows, ends, received, count, ctx.group(axis))
    room = ctx.call(aten.new_zeros.default, rows, [size, *op.result_shape()[1:]])
    return (ctx.call(aten.index_add.default, room, 0, target, rows),)


def expert_rows(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """A grouped product of a rank's own groups: where they end among its own rows."""
    op = Shards(ctx, node, rules, operands)
    axis = next(axis for axis, rule in enumerate(rules) if rule.lowering == "expert_rows")
    slot = op.slot("offs")
    ends, dtype = operands[slot], op.traced.inputs[slot].dtype
    if rules[axis].inputs[slot] == PARTIAL:
        total = ctx.call(aten.sum.dim_IntList, ctx.received_counts(ends, axis), [0])
        own = ctx.call(aten.cumsum.default, total, 0, dtype=dtype)
    else:
        own = _own_ends(ctx, ends, axis, op.traced.inputs[slot].shape[0] // ctx.mesh[axis])
    return op.call({"offs": own})


def _own_ends(ctx: LowerContext, ends: fx.Node, axis: int, groups: int) -> fx.Node:
    """Ends of this rank's groups, counted from where its first one starts."""
    limits = ctx.call(aten.constant_pad_nd.default, ends, [1, 0], 0)
    start = ctx.call(operator.mul, ctx.coord(axis), groups)
    first = ctx.call(operator.add, start, 1)
    before = ctx.call(aten.slice.Tensor, limits, 0, start, first)
    own = ctx.call(aten.slice.Tensor, limits, 0, first, ctx.call(operator.add, first, groups))
    return ctx.call(aten.sub.Tensor, own, before)


def _expert_axis(placements: list[str | None]) -> int | None:
    """The axis that cuts groups, if any."""
    return next((axis for axis, p in enumerate(placements) if p is not None and p[0] == "E"), None)
