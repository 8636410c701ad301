"""The same op on shards: what most rules ask for, and what all other lowerings build on."""

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
from autopar.codegen.draws import drop_whole
from autopar.errors import PlanError
from autopar.placements import State, local_shape, shard, shard_dim
from autopar.rules import AxisRule
from autopar.rules import operands as operands_of
from autopar.rules import results as results_of
from autopar.rules.images import RESIZES_BACKWARD
from autopar.rules.schema import OpCall, bind, op_call

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

    def permute(self, x: fx.Node, axis: int, destinations: Sequence[int]) -> fx.Node:
        """Append a message from every rank of an axis to one other and the wait for it."""

    def group(self, axis: int) -> str:
        """What stands for the process group of an axis."""

    def received_counts(self, ends: fx.Node, axis: int) -> fx.Node:
        """[ranks, groups of this rank]: rows that each rank of an axis sends to this one, by where its groups end."""


Lowering = Callable[[LowerContext, fx.Node, tuple[AxisRule, ...], list[fx.Node]], Results]


# Arguments that hold the size of the first result.
_SIZE_ARGUMENTS = {
    **{f"aten.{name}": "size" for name in ("expand", "expand_copy", "full", "zeros", "ones", "empty")},
    **{f"aten.new_{name}": "size" for name in ("full", "zeros", "ones", "empty")},
    "aten.slice_backward": "input_sizes",
    "aten.select_backward": "input_sizes",
    **dict.fromkeys(sorted(RESIZES_BACKWARD), "input_size"),
}
# Ops that only give another shape. As views, they may not fit the strides of a shard, and
# squeeze would drop dims that are of size 1 on a rank only: reshape does neither.
_RESHAPES = frozenset({"aten.view", "aten._unsafe_view", "aten.reshape", "aten.view_copy", "aten.squeeze"})
_GROUP_NORMS = frozenset({"aten.native_group_norm", "aten.native_group_norm_backward"})
_CONVOLUTIONS = frozenset({"aten.convolution", "aten.convolution_backward"})
# Kernels that read some operand as if it were contiguous (true of what they were traced with,
# not of a shard that is a slice): they give wrong numbers or fail otherwise. Seen in torch 2.13.
_CONTIGUOUS = _GROUP_NORMS | {
    "aten._weight_norm_interface",
    "aten._weight_norm_interface_backward",
    "aten.native_layer_norm_backward",
    "aten._fused_rms_norm_backward",
    "aten.nll_loss2d_backward",
}
# Kernels that take these operands to have the elements of a row (of the last dim) side by side; else they read others.
_DENSE_ROWS = ("query", "key", "value", "out", "grad_out")


@dataclass(frozen=True)
class Shards:
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

    def result_sizes(self) -> list[int]:
        """The same as a size argument: -1 for rows of which only the run knows how many there are."""
        dims = {shard_dim(rule.outputs[0]) for rule in self.rules if rule.outputs[0] and rule.outputs[0][0] == "E"}
        return [-1 if dim in dims else size for dim, size in enumerate(self.result_shape())]

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


def local(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """The same op on local operands, with size arguments that fit the local result."""
    op = Shards(ctx, node, rules, operands)
    if not isinstance(node.target, OpOverload):
        local = iter(operands)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: next(local))
        assert callable(node.target)
        return op.unpack(ctx.call(node.target, *args, **kwargs))
    name = str(node.target.overloadpacket)
    if name in _RESHAPES and node.target is not aten.view.dtype:
        return (ctx.call(aten.reshape.default, operands[0], op.result_sizes()),)
    if name in ("aten.as_strided", "aten.native_dropout"):
        return _as_strided(op) if name == "aten.as_strided" else drop_whole(ctx, node, operands)
    if name in _SIZE_ARGUMENTS:
        return op.call({_SIZE_ARGUMENTS[name]: op.result_sizes()})
    op = replace(op, operands=as_kernels_read(ctx, node, operands))
    if name in _GROUP_NORMS:
        return op.call(_group_norm_sizes(op))
    if name in _CONVOLUTIONS:
        return op.call(_convolution_sizes(op))
    return op.call({})


def as_kernels_read(ctx: LowerContext, node: fx.Node, operands: list[fx.Node]) -> list[fx.Node]:
    """Operands of a kernel, made contiguous where it takes them to be."""
    if str(getattr(node.target, "overloadpacket", node.target)) not in _CONTIGUOUS:
        return operands
    return [ctx.call(aten.contiguous.default, x) for x in operands]


def with_dense_rows(ctx: LowerContext, node: fx.Node, operands: list[fx.Node]) -> list[fx.Node]:
    """Operands of fused attention, copied where rows are not side by side (as of what is glued along its last dim)."""
    if not str(node.target).startswith("aten._scaled_dot_product"):
        return operands
    slots = op_call(node).slots
    apart = {slots[name][0] for name in _DENSE_ROWS if name in slots}
    apart = {slot for slot in apart if operands[slot].meta["val"].stride(-1) != 1}
    return [ctx.call(aten.contiguous.default, x) if i in apart else x for i, x in enumerate(operands)]


def _group_norm_sizes(op: Shards) -> dict[str, int]:
    """N, C and group of native_group_norm(_backward) on a rank; channels are cut by whole groups."""
    slot = op.slot("input")
    samples, channels, *_ = op.operand_shape(slot)
    given = op.arguments()
    return {"N": samples, "C": channels, "group": given["group"] * channels // given["C"]}


def _convolution_sizes(op: Shards) -> dict[str, Any]:
    """Groups and (backward) the bias' size on a rank; channels of a grouped convolution are cut by whole groups."""
    given = op.arguments()
    changes: dict[str, Any] = {}
    if given["groups"] > 1:
        parts = op.traced.inputs[op.slot("input")].shape[1] // op.operand_shape(op.slot("input"))[1]
        if given["groups"] % parts:
            raise PlanError(
                f"{op.node.name} ({op.node.target}) has {given['groups']} groups, which {parts} parts do not divide; "
                "cut its channels less"
            )
        changes["groups"] = given["groups"] // parts
    if given.get("bias_sizes") is not None and op.traced.outputs[2] is not None:
        changes["bias_sizes"] = list(op.result_shape(2))
    return changes


def _as_strided(op: Shards) -> Results:
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
