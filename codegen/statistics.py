"""Batch norm over a batch that is cut: the statistics are those of the whole batch, as on one device.

Each pass moves two numbers per channel (Ioffe and Szegedy 2015, for the formulas). All passes over
the pixels are torch's fused kernels: the backward kernel of batch norm sums g * (x - m) and g over
all but the channel dim, which serves for the second moment too (g = x), and its evaluation form
applies a scale and a shift per channel.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import torch
from torch import fx

from autopar.codegen.shards import LowerContext, Results, Shards, aten
from autopar.rules import AxisRule


def batch_norm(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """-> (out, mean, invstd[, running mean, running variance]) of a training step.

    Ranks exchange the sum and the sum of squares of x - shift; the shift is the running mean, which
    is near the mean, so that their difference is exact where the mean is large.
    """
    op = Shards(ctx, node, rules, operands)
    given, call = op.arguments(), ctx.call
    x, eps = given["input"], given["eps"]
    mean_like = op.traced.outputs[1]
    assert mean_like is not None
    local, count = _counts(op, "batch_norm")
    own_mean = call(aten.div.Scalar, _sum(op, x, mean_like.dtype), local)
    _, moment = _channel_sums(op, x, x, own_mean)  # of (x - own mean) squared
    shift = given.get("running_mean")
    off = own_mean if shift is None else call(aten.sub.Tensor, own_mean, shift)
    square = call(aten.add.Tensor, moment, call(aten.mul.Tensor, call(aten.square.default, off), local))
    first, second = _all_reduced(op, (call(aten.mul.Scalar, off, local), square), "batch_norm")
    off = call(aten.div.Scalar, first, count)
    spread = call(aten.sub.Tensor, call(aten.div.Scalar, second, count), call(aten.square.default, off))
    variance = call(aten.clamp_min.default, spread, 0.0)
    mean = off if shift is None else call(aten.add.Tensor, off, shift)
    out = _normalized(op, x, given.get("weight"), given.get("bias"), mean, variance, eps)
    invstd = call(aten.rsqrt.default, call(aten.add.Scalar, variance, eps))
    if shift is None:
        return (out, mean, invstd)
    unbiased = call(aten.mul.Scalar, variance, count / (count - 1) if count > 1 else math.nan)
    pairs = ((shift, mean), (given["running_var"], unbiased))
    return (out, mean, invstd, *(call(aten.lerp.Scalar, old, new, given["momentum"]) for old, new in pairs))


def batch_norm_backward(
    ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]
) -> Results:
    """-> (grad_input, grad_weight, grad_bias), the latter two whole.

    With w the weight, s = w * invstd, N the count: grad_input = s * grad + b * x + c, where
    b = -s * invstd * grad_weight / N and c = -s * grad_bias / N - b * mean.
    """
    op = Shards(ctx, node, rules, operands)
    given, call = op.arguments(), ctx.call
    grad, x, mean, invstd = (given[name] for name in ("grad_out", "input", "save_mean", "save_invstd"))
    _, count = _counts(op, "batch_norm_backward")
    total, product = _all_reduced(op, _channel_sums(op, grad, x, mean), "batch_norm_backward")
    grad_weight = call(aten.mul.Tensor, product, invstd)
    wanted: Sequence[bool] = given["output_mask"]
    sums = (grad_weight if wanted[1] else None, total if wanted[2] else None)
    if not wanted[0]:
        return (None, *sums)
    weight = given.get("weight")
    scale = invstd if weight is None else call(aten.mul.Tensor, weight, invstd)
    slope = call(aten.div.Scalar, call(aten.mul.Tensor, scale, call(aten.mul.Tensor, invstd, grad_weight)), -count)
    constant = call(aten.div.Scalar, call(aten.mul.Tensor, scale, total), -count)
    line = _normalized(op, x, slope, constant, mean, call(aten.ones_like.default, invstd), 0.0)
    rank = op.traced.out.dim()
    scale = call(aten.view.default, scale, [-1, *(1 for _ in range(rank - 2))])
    made = call(aten.addcmul.default, line, grad, scale)
    return (_to(op, made, op.traced.out.dtype), *sums)


def _counts(op: Shards, lowering: str) -> tuple[int, int]:
    """How many numbers there are per channel: on this rank, and in the whole batch."""
    batch, _, *pixels = op.operand_shape(op.slot("input"))
    local = batch * math.prod(pixels)
    return local, local * math.prod(op.ctx.mesh[axis] for axis in _axes(op, lowering))


def _axes(op: Shards, lowering: str) -> list[int]:
    return [axis for axis, rule in enumerate(op.rules) if rule.lowering == lowering]


def _sum(op: Shards, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Per channel: the sum of x [N, C, *], in `dtype`."""
    dims = [d for d in range(op.traced.inputs[op.slot("input")].dim()) if d != 1]
    return op.ctx.call(aten.sum.dim_IntList, x, dims, dtype=dtype)


def _channel_sums(op: Shards, grad: fx.Node, x: fx.Node, mean: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Per channel: the sum of grad, and that of grad * (x - mean)."""
    call = op.ctx.call
    one = call(aten.ones_like.default, mean)
    kernel = aten.native_batch_norm_backward.default
    made = call(kernel, grad, x, None, None, None, mean, one, True, 0.0, [False, True, True])
    return call(operator.getitem, made, 2), call(operator.getitem, made, 1)


def _all_reduced(op: Shards, pair: tuple[fx.Node, fx.Node], lowering: str) -> tuple[fx.Node, fx.Node]:
    """Two vectors summed over the ranks, in one collective per axis."""
    both = op.ctx.call(aten.stack.default, list(pair))
    for axis in _axes(op, lowering):
        both = op.ctx.all_reduce(both, axis, "sum")
    return op.ctx.call(aten.select.int, both, 0, 0), op.ctx.call(aten.select.int, both, 0, 1)


def _normalized(
    op: Shards, x: fx.Node, weight: fx.Node | None, bias: fx.Node | None, mean: fx.Node, variance: fx.Node, eps: float
) -> fx.Node:
    """weight * (x - mean) / sqrt(variance + eps) + bias, per channel."""
    kernel = aten._native_batch_norm_legit_no_training.default
    return op.ctx.call(operator.getitem, op.ctx.call(kernel, x, weight, bias, mean, variance, 0.0, eps), 0)


def _to(op: Shards, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """`x` in a dtype: with weights in float32, sums of products with a narrow x are wide."""
    inputs = [op.traced.inputs[op.slot(name)] for name in ("grad_out", "input", "save_invstd")]
    made = functools.reduce(torch.promote_types, (t.dtype for t in inputs))
    return x if made == dtype else op.ctx.call(aten._to_copy.default, x, dtype=dtype)
