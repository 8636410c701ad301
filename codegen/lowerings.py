"""How one op is written on a rank, given the rule it follows on each mesh axis.

`lower` appends the local computation of one global node to a new graph. The lowering
"local" is the same op on the shards, with its size arguments made local. The others do
more: they mask what other ranks own and combine small statistics over the axes on which
their rule is active. A lowering sees the rules of all axes, as it may be active on
several (batch cut by one, classes by another, or classes by both).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from autopar.codegen.draws import draw
from autopar.codegen.experts import expert_rows, from_groups, to_groups
from autopar.codegen.ring import ring, ring_backward
from autopar.codegen.shards import (
    LowerContext,
    Lowering,
    Results,
    Shards,
    as_kernels_read,
    aten,
    local,
    with_dense_rows,
)
from autopar.codegen.shared_heads import (
    SHARED_HEADS,
    SHARED_HEADS_BACKWARD,
    shared_heads,
    shared_heads_backward,
)
from autopar.codegen.statistics import batch_norm, batch_norm_backward
from autopar.errors import PlanError
from autopar.placements import shard, shard_dim
from autopar.rules import AxisRule
from autopar.rules import operands as operands_of
from autopar.rules.ring import RING, RING_BACKWARD
from autopar.rules.schema import normalized


def lower(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """Append the local computation of `node` to `ctx`.

    rules: one per mesh axis. operands: the local operands, in the order of
    `autopar.rules.operands(node)`, placed as the rules' inputs say. Returns one node per
    result of the op, None for results that do not exist.
    """
    names = sorted({rule.lowering for rule in rules} - {"local"})
    if len(names) > 1:
        raise PlanError(
            f"{node.name} ({node.target}) cannot be lowered as {' and '.join(names)} at once; "
            "choose rules of which at most one is not local (autopar.rules.compatible)"
        )
    if len(rules) != len(ctx.mesh) or len(operands) != len(operands_of(node)):
        raise PlanError(
            f"{node.name} ({node.target}) has {len(operands)} local operands and {len(rules)} rules; it needs "
            f"{len(operands_of(node))} operands, and one rule for each of {len(ctx.mesh)} mesh axes"
        )
    name = names[0] if names else "local"
    if name not in LOWERINGS:
        raise PlanError(f"{node.name} ({node.target}): no lowering is called {name!r}; plan again with this autopar")
    return LOWERINGS[name](ctx, node, rules, with_dense_rows(ctx, node, operands))


# -- averages ----------------------------------------------------------------------------------


def _mean_partial(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """An op that divides by the local count: divide again by how often the whole is that large."""
    parts = math.prod(n for n, rule in zip(ctx.mesh, rules, strict=True) if rule.lowering == "mean_partial")
    made = local(ctx, node, rules, operands)
    return tuple(None if x is None else ctx.call(aten.div.Scalar, x, parts) for x in made)


# -- products that add a bias, cut along what they contract ----------------------------------


def _shared_bias(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """Each rank's summand has its share of the bias: together they have all of it."""
    op = Shards(ctx, node, rules, operands)
    parts = math.prod(n for n, rule in zip(ctx.mesh, rules, strict=True) if rule.lowering == "shared_bias")
    return op.call({"beta": op.traced.arg("beta", 1) / parts})


# -- products with a matrix per group of rows -------------------------------------------------


def _grouped_rows(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """The groups that this rank's rows (or summands) belong to: their ends, counted from where its part starts."""
    op = Shards(ctx, node, rules, operands)
    slot = 0
    dim = next(shard_dim(rule.inputs[slot]) for rule in rules if rule.lowering == "grouped_rows")
    assert dim is not None
    size = op.operand_shape(slot)[dim]
    ends = ctx.call(aten.sub.Tensor, operands[op.slot("offs")], op.offset(op.axes(slot, dim), size))
    return op.call({"offs": ctx.call(aten.clamp.default, ends, 0, size)})


# -- vocabulary-parallel ops -----------------------------------------------------------------


def _outside(op: Shards, index: fx.Node, slot: int, dim: int) -> tuple[fx.Node, fx.Node]:
    """Indices counted from the start of this rank's part of a cut dim of an operand, and where they lie outside it."""
    size = op.operand_shape(slot)[dim]
    return _outside_of(op, index, op.offset(op.axes(slot, dim), size), size)


def _outside_of(op: Shards, index: fx.Node, offset: fx.Node, size: int) -> tuple[fx.Node, fx.Node]:
    call = op.ctx.call
    shifted = call(aten.sub.Tensor, index, offset)
    below, above = call(aten.lt.Scalar, shifted, 0), call(aten.ge.Scalar, shifted, size)
    return shifted, call(aten.logical_or.default, below, above)


def _vocab_embedding(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """Look up this rank's rows; rows of other ranks are zero, so that the ranks' results are summands."""
    op = Shards(ctx, node, rules, operands)
    shifted, outside = _outside(op, operands[op.slot("indices")], op.slot("weight"), 0)
    (rows,) = op.call({"indices": ctx.call(aten.masked_fill.Scalar, shifted, outside, 0)})
    return (ctx.call(aten.masked_fill.Scalar, rows, ctx.call(aten.unsqueeze.default, outside, -1), 0.0),)


def _vocab_embedding_backward(
    ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]
) -> Results:
    """The gradient of this rank's rows; what belongs elsewhere goes to a padding row behind them, cut off at last."""
    op = Shards(ctx, node, rules, operands)
    rows = op.result_shape()[0]
    indices = operands[op.slot("indices")]
    cutting = [axis for axis, rule in enumerate(rules) if rule.outputs[0] == shard(0)]
    shifted, dropped = _outside_of(op, indices, op.offset(cutting, rows), rows)
    padding = op.traced.arg("padding_idx")
    if padding >= 0:
        dropped = ctx.call(aten.logical_or.default, dropped, ctx.call(aten.eq.Scalar, indices, padding))
    kept = ctx.call(aten.masked_fill.Scalar, shifted, dropped, rows)
    (made,) = op.call({"indices": kept, "num_weights": rows + 1, "padding_idx": rows})
    return (ctx.call(aten.slice.Tensor, made, 0, 0, rows),)


_LOW_PRECISION = (torch.float16, torch.bfloat16)


def _to(ctx: LowerContext, x: fx.Node, source: torch.dtype, target: torch.dtype) -> fx.Node:
    return x if source == target else ctx.call(aten._to_copy.default, x, dtype=target)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax kernels sum low precision in float32 (at::acc_type)."""
    return torch.float32 if dtype in _LOW_PRECISION else dtype


def _vocab_softmax(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """(log_)softmax along a cut dim: the maximum and the sum of exponentials are those of all ranks."""
    op = Shards(ctx, node, rules, operands)
    source = op.traced.inputs[0]
    dim = normalized(op.traced.arg("dim"), source.dim())
    wide = _accumulation_dtype(source.dtype)
    x = _to(ctx, operands[0], source.dtype, wide)
    maximum = ctx.call(aten.amax.default, x, [dim], True)
    for axis in op.axes(0, dim):
        maximum = ctx.all_reduce(maximum, axis, "max")
    centred = ctx.call(aten.sub.Tensor, x, maximum)
    exponentials = ctx.call(aten.exp.default, centred)
    total = ctx.call(aten.sum.dim_IntList, exponentials, [dim], True)
    for axis in op.axes(0, dim):
        total = ctx.all_reduce(total, axis, "sum")
    if op.traced.name == "aten._log_softmax":
        made = ctx.call(aten.sub.Tensor, centred, ctx.call(aten.log.default, total))
    else:
        made = ctx.call(aten.div.Tensor, exponentials, total)
    return (_to(ctx, made, wide, op.traced.out.dtype),)


def _vocab_softmax_backward(
    ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]
) -> Results:
    """The gradient through (log_)softmax along a cut dim; the sum over the dim is that of all ranks.

    log_softmax: grad - exp(output) * sum(grad). softmax: output * (grad - sum(grad * output)).
    """
    op = Shards(ctx, node, rules, operands)
    grad_at, output_at = op.slot("grad_output"), op.slot("output")
    dim = normalized(op.traced.arg("dim"), op.traced.out.dim())
    wide = _accumulation_dtype(op.traced.inputs[output_at].dtype)
    grad, output = (_to(ctx, operands[at], op.traced.inputs[at].dtype, wide) for at in (grad_at, output_at))
    is_log = op.traced.name == "aten._log_softmax_backward_data"
    summed = grad if is_log else ctx.call(aten.mul.Tensor, grad, output)
    total = ctx.call(aten.sum.dim_IntList, summed, [dim], True)
    for axis in op.axes(output_at, dim):
        total = ctx.all_reduce(total, axis, "sum")
    if is_log:
        probability = ctx.call(aten.exp.default, output)
        made = ctx.call(aten.sub.Tensor, grad, ctx.call(aten.mul.Tensor, probability, total))
    else:
        made = ctx.call(aten.mul.Tensor, output, ctx.call(aten.sub.Tensor, grad, total))
    return (_to(ctx, made, wide, op.traced.out.dtype),)


# -- the loss over classes -------------------------------------------------------------------

_REDUCE_NONE, _REDUCE_MEAN, _REDUCE_SUM = 0, 1, 2
_IGNORE = -100  # outside of any range of classes


def _local_targets(op: Shards) -> dict[str, Any]:
    """Changed arguments of a loss whose classes are cut: targets of other ranks are ignored. Empty if they are not."""
    slot = op.slot("self")
    class_dim = 1 if op.traced.inputs[slot].dim() > 1 else 0
    if not op.axes(slot, class_dim):
        return {}
    call, target = op.ctx.call, op.operands[op.slot("target")]
    shifted, outside = _outside(op, target, slot, class_dim)
    ignored = call(aten.eq.Scalar, target, op.traced.arg("ignore_index"))
    elsewhere = call(aten.logical_or.default, outside, ignored)
    return {"target": call(aten.masked_fill.Scalar, shifted, elsewhere, _IGNORE), "ignore_index": _IGNORE}


def _nll_loss(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """Sum the local targets' losses and weights; the all-reduced weights divide the sum if a mean is wanted.

    Without weights of classes the targets are counted apart from the losses: the ranks can agree on the count before
    they have made any loss (`codegen/overlap.py`), and need not wait for each other in the middle of a step.
    """
    op = Shards(ctx, node, rules, operands)
    reduction = op.traced.arg("reduction")
    changes = _local_targets(op)
    if reduction == _REDUCE_NONE:
        return op.call(changes)
    loss, total = op.call(changes | {"reduction": _REDUCE_SUM})
    assert loss is not None and total is not None
    axes = [axis for axis, rule in enumerate(rules) if rule.lowering == "nll_loss"]
    whole = op.traced.outputs[1]
    if axes and whole is not None and op.traced.arg("weight") is None:
        total = _count(op, changes, whole.dtype)
    for axis in axes:
        total = ctx.all_reduce(total, axis, "sum")
    if reduction == _REDUCE_MEAN:
        loss = ctx.call(aten.div.Tensor, loss, total)
    return (loss, total)


def _count(op: Shards, changes: dict[str, Any], dtype: torch.dtype) -> fx.Node:
    """Of the local targets that are not ignored."""
    call, target = op.ctx.call, changes.get("target", op.operands[op.slot("target")])
    counted = call(aten.ne.Scalar, target, changes.get("ignore_index", op.traced.arg("ignore_index")))
    return call(aten._to_copy.default, call(aten.sum.default, counted), dtype=dtype)


def _nll_loss_backward(
    ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]
) -> Results:
    """The gradient at the local targets. total_weight is the whole batch's, so a mean is the mean over all of it."""
    op = Shards(ctx, node, rules, as_kernels_read(ctx, node, operands))
    return op.call(_local_targets(op))


LOWERINGS: dict[str, Lowering] = {
    "local": local,
    "mean_partial": _mean_partial,
    "draw": draw,
    "vocab_embedding": _vocab_embedding,
    "vocab_embedding_backward": _vocab_embedding_backward,
    "vocab_softmax": _vocab_softmax,
    "vocab_log_softmax": _vocab_softmax,
    "vocab_softmax_backward": _vocab_softmax_backward,
    "vocab_log_softmax_backward": _vocab_softmax_backward,
    "shared_bias": _shared_bias,
    "grouped_rows": _grouped_rows,
    "expert_rows": expert_rows,
    "to_groups": to_groups,
    "from_groups": from_groups,
    "batch_norm": batch_norm,
    "batch_norm_backward": batch_norm_backward,
    "nll_loss": _nll_loss,
    "nll_loss_backward": _nll_loss_backward,
    SHARED_HEADS: shared_heads,
    SHARED_HEADS_BACKWARD: shared_heads_backward,
    RING: ring,
    RING_BACKWARD: ring_backward,
}
