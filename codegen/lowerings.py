"""How one op is written on a rank, given the rule it follows on each mesh axis.

`lower` appends the local computation of one global node to a new graph. The lowering
"local" is the same op on the shards, with its size arguments made local. The others do
more: they mask what other ranks own and combine small statistics over the axes on which
their rule is active. A lowering sees the rules of all axes, as it may be active on
several (batch cut by one, classes by another, or classes by both).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import fx

from autopar._torch_compat import OpOverload
from autopar.codegen.draws import draw, drop_whole
from autopar.errors import PlanError
from autopar.placements import State, local_shape, shard
from autopar.rules import AxisRule
from autopar.rules import operands as operands_of
from autopar.rules import results as results_of
from autopar.rules.schema import OpCall, bind, normalized, op_call

aten = torch.ops.aten

Results = tuple[fx.Node | None, ...]


class LowerContext(Protocol):
    """What a lowering needs of the graph it writes into (`codegen.builder.GraphBuilder` is one).

    graph: the graph under construction. mesh: sizes of the mesh axes.
    """

    graph: fx.Graph
    mesh: tuple[int, ...]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call_function node."""

    def coord(self, axis: int) -> fx.Node:
        """An int-valued node: this rank's coordinate on a mesh axis."""

    def all_reduce(self, x: fx.Node, axis: int, op: str = "sum") -> fx.Node:
        """Append an all-reduce ("sum" or "max") over an axis and the wait for it."""


Lowering = Callable[[LowerContext, fx.Node, tuple[AxisRule, ...], list[fx.Node]], Results]


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
    return LOWERINGS[name](ctx, node, rules, operands)


# -- the same op on shards -------------------------------------------------------------------

# Arguments that hold the size of the first result.
_SIZE_ARGUMENTS = {
    **{f"aten.{name}": "size" for name in ("expand", "expand_copy", "full", "zeros", "ones", "empty")},
    **{f"aten.new_{name}": "size" for name in ("full", "zeros", "ones", "empty")},
    "aten.slice_backward": "input_sizes",
    "aten.select_backward": "input_sizes",
}
# Ops that only give another shape. As views, they may not fit the strides of a shard, and
# squeeze would drop dims that are of size 1 on a rank only: reshape does neither.
_RESHAPES = frozenset({"aten.view", "aten._unsafe_view", "aten.reshape", "aten.view_copy", "aten.squeeze"})
_GROUP_NORMS = frozenset({"aten.native_group_norm", "aten.native_group_norm_backward"})
# Kernels that read some operand as if it were contiguous (true of what they were traced with,
# not of a shard that is a slice): they give wrong numbers or fail otherwise. Seen in torch 2.13.
_CONTIGUOUS = _GROUP_NORMS | {"aten.native_layer_norm_backward", "aten._fused_rms_norm_backward"}


@dataclass(frozen=True)
class _Shards:
    """One op to lower, with what its rules make of its tensors."""

    ctx: LowerContext
    node: fx.Node
    rules: tuple[AxisRule, ...]
    operands: list[fx.Node]

    def arguments(self) -> dict[str, Any]:
        """Arguments by schema name, local operands in place of global ones."""
        local = iter(self.operands)
        return {name: fx.node.map_arg(value, lambda n: next(local)) for name, value in bind(self.node)}

    def slot(self, name: str) -> int:
        """The position among the operands of a tensor argument that is given."""
        return self.traced.slots[name][0]

    @cached_property
    def traced(self) -> OpCall:
        """The op as it was traced: global fake tensors."""
        return op_call(self.node)

    def result_shape(self, index: int = 0) -> tuple[int, ...]:
        """The shape of a result on a rank."""
        tensor = results_of(self.node)[index]
        placements = tuple(rule.outputs[index] for rule in self.rules)
        assert tensor is not None
        return self._local(tensor, placements)

    def operand_shape(self, slot: int) -> tuple[int, ...]:
        """The shape of an operand on a rank."""
        tensor = operands_of(self.node)[slot].meta["val"]
        return self._local(tensor, tuple(rule.inputs[slot] for rule in self.rules))

    def _local(self, tensor: torch.Tensor, placements: Sequence[str | None]) -> tuple[int, ...]:
        state: State = tuple(p or "R" for p in placements)
        shape = local_shape(tuple(map(int, tensor.shape)), state, self.ctx.mesh)
        if shape is None:
            raise PlanError(
                f"{self.node.name} ({self.node.target}): {tuple(tensor.shape)} does not divide as {state} "
                f"on mesh {self.ctx.mesh}; choose other placements"
            )
        return shape

    def axes(self, slot: int, dim: int) -> list[int]:
        """The axes that cut dim `dim` of an operand, outer first."""
        return [axis for axis, rule in enumerate(self.rules) if rule.inputs[slot] == shard(dim)]

    def offset(self, axes: Sequence[int], size: int) -> fx.Node:
        """An int node: where this rank's part, of `size`, of a dim cut by `axes` (outer first) starts."""
        first, *inner = axes
        index = self.ctx.coord(first)
        for axis in inner:
            index = self.ctx.call(operator.mul, index, self.ctx.mesh[axis])
            index = self.ctx.call(operator.add, index, self.ctx.coord(axis))
        return self.ctx.call(operator.mul, index, size)

    def unpack(self, made: fx.Node) -> Results:
        """A node per result from the node of the call."""
        if isinstance(self.node.meta.get("val"), torch.Tensor):
            return (made,)
        return tuple(
            None if tensor is None else self.ctx.call(operator.getitem, made, index)
            for index, tensor in enumerate(results_of(self.node))
        )

    def call(self, changes: dict[str, Any]) -> Results:
        """The op itself on the local operands, some arguments changed."""
        target = self.node.target
        arguments = self.arguments() | changes
        assert isinstance(target, OpOverload)
        positional, by_name = [], {}
        in_order = True
        for parameter in target._schema.arguments:
            if parameter.name not in arguments:
                in_order = False
            elif in_order and not parameter.kwarg_only:
                positional.append(arguments[parameter.name])
            else:
                by_name[parameter.name] = arguments[parameter.name]
        return self.unpack(self.ctx.call(target, *positional, **by_name))


def _local(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """The same op on local operands, with size arguments that fit the local result."""
    op = _Shards(ctx, node, rules, operands)
    if not isinstance(node.target, OpOverload):
        local = iter(operands)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: next(local))
        assert callable(node.target)
        return op.unpack(ctx.call(node.target, *args, **kwargs))
    name = str(node.target.overloadpacket)
    if name in _RESHAPES and node.target is not aten.view.dtype:
        return (ctx.call(aten.reshape.default, operands[0], list(op.result_shape())),)
    if name in ("aten.as_strided", "aten.native_dropout"):
        return _as_strided(op) if name == "aten.as_strided" else drop_whole(ctx, node, operands)
    if name in _SIZE_ARGUMENTS:
        return op.call({_SIZE_ARGUMENTS[name]: list(op.result_shape())})
    if name in _CONTIGUOUS:
        op = replace(op, operands=[ctx.call(aten.contiguous.default, x) for x in operands])
    if name in _GROUP_NORMS:
        return op.call(_group_norm_sizes(op))
    return op.call({})


def _group_norm_sizes(op: _Shards) -> dict[str, int]:
    """N, C and group of native_group_norm(_backward) on a rank; channels are cut by whole groups."""
    slot = op.slot("input")
    samples, channels, *_ = op.operand_shape(slot)
    given = op.arguments()
    return {"N": samples, "C": channels, "group": given["group"] * channels // given["C"]}


def _as_strided(op: _Shards) -> Results:
    """as_strided reads storage, so the operand is first laid out as it was when traced."""
    traced = operands_of(op.node)[0].meta["val"]
    shape, stride = tuple(map(int, traced.shape)), tuple(map(int, traced.stride()))
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    given = op.arguments()
    start = given.get("storage_offset")
    start = 0 if start is None else start - int(traced.storage_offset())
    if span != math.prod(shape) or start < 0:
        raise PlanError(
            f"{op.node.name} (aten.as_strided) reads memory outside of its operand {shape} with strides {stride}; "
            "write it with slices or unfold in the model"
        )
    call = op.ctx.call
    room = call(aten.empty_strided.default, list(shape), list(stride), dtype=traced.dtype, device=traced.device)
    laid_out = call(aten.copy.default, room, op.operands[0])
    return (call(aten.as_strided.default, laid_out, given["size"], given["stride"], start),)


# -- averages ----------------------------------------------------------------------------------


def _mean_partial(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """An op that divides by the local count: divide again by how often the whole is that large."""
    parts = math.prod(n for n, rule in zip(ctx.mesh, rules, strict=True) if rule.lowering == "mean_partial")
    made = _local(ctx, node, rules, operands)
    return tuple(None if x is None else ctx.call(aten.div.Scalar, x, parts) for x in made)


# -- vocabulary-parallel ops -----------------------------------------------------------------


def _outside(op: _Shards, index: fx.Node, slot: int, dim: int) -> tuple[fx.Node, fx.Node]:
    """Indices counted from the start of this rank's part of a cut dim of an operand, and where they lie outside it."""
    size = op.operand_shape(slot)[dim]
    return _outside_of(op, index, op.offset(op.axes(slot, dim), size), size)


def _outside_of(op: _Shards, index: fx.Node, offset: fx.Node, size: int) -> tuple[fx.Node, fx.Node]:
    call = op.ctx.call
    shifted = call(aten.sub.Tensor, index, offset)
    below, above = call(aten.lt.Scalar, shifted, 0), call(aten.ge.Scalar, shifted, size)
    return shifted, call(aten.logical_or.default, below, above)


def _vocab_embedding(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """Look up this rank's rows; rows of other ranks are zero, so that the ranks' results are summands."""
    op = _Shards(ctx, node, rules, operands)
    shifted, outside = _outside(op, operands[op.slot("indices")], op.slot("weight"), 0)
    (rows,) = op.call({"indices": ctx.call(aten.masked_fill.Scalar, shifted, outside, 0)})
    return (ctx.call(aten.masked_fill.Scalar, rows, ctx.call(aten.unsqueeze.default, outside, -1), 0.0),)


def _vocab_embedding_backward(
    ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]
) -> Results:
    """The gradient of this rank's rows; what belongs elsewhere goes to a padding row behind them, cut off at last."""
    op = _Shards(ctx, node, rules, operands)
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
    op = _Shards(ctx, node, rules, operands)
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
    op = _Shards(ctx, node, rules, operands)
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


def _local_targets(op: _Shards) -> dict[str, Any]:
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
    """Sum the local targets' losses and weights; the all-reduced weights divide the sum if a mean is wanted."""
    op = _Shards(ctx, node, rules, operands)
    reduction = op.traced.arg("reduction")
    changes = _local_targets(op)
    if reduction == _REDUCE_NONE:
        return op.call(changes)
    loss, total = op.call(changes | {"reduction": _REDUCE_SUM})
    assert loss is not None and total is not None
    for axis, rule in enumerate(rules):
        if rule.lowering == "nll_loss":
            total = ctx.all_reduce(total, axis, "sum")
    if reduction == _REDUCE_MEAN:
        loss = ctx.call(aten.div.Tensor, loss, total)
    return (loss, total)


def _nll_loss_backward(
    ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]
) -> Results:
    """The gradient at the local targets. total_weight is the whole batch's, so a mean is the mean over all of it."""
    op = _Shards(ctx, node, rules, operands)
    return op.call(_local_targets(op))


LOWERINGS: dict[str, Lowering] = {
    "local": _local,
    "mean_partial": _mean_partial,
    "draw": draw,
    "vocab_embedding": _vocab_embedding,
    "vocab_embedding_backward": _vocab_embedding_backward,
    "vocab_softmax": _vocab_softmax,
    "vocab_log_softmax": _vocab_softmax,
    "vocab_softmax_backward": _vocab_softmax_backward,
    "vocab_log_softmax_backward": _vocab_softmax_backward,
    "nll_loss": _nll_loss,
    "nll_loss_backward": _nll_loss_backward,
}
