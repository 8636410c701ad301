"""What one op costs on one rank, in the states that a plan gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import fx

from autopar._torch_compat import pytree
from autopar.cost.compute import op_class, op_flops, op_name
from autopar.cost.model import CostModel
from autopar.dataflow import Operand, result_metas
from autopar.placements import State, local_shape, shard_dim
from autopar.rules.types import AxisRule, InnerCollective


def local_bytes(tensor: torch.Tensor, state: State, mesh: Sequence[int]) -> int:
    """Bytes a rank holds of a tensor in a state."""
    return _numbers(tensor.shape, state, tuple(mesh)) * tensor.element_size()


@cache
def _numbers(shape: torch.Size, state: State, mesh: tuple[int, ...]) -> int:
    """How many of a tensor a rank holds; asked for every option of every op, and there are few shapes."""
    local = local_shape(shape, state, mesh)
    if local is None:
        raise ValueError(f"{tuple(shape)} cannot be cut as {state} on mesh {mesh}")
    return math.prod(local)


def op_flops_of(node: fx.Node) -> int:
    """FLOPs of the whole (unsharded) op, cached on the node."""
    if "flops" not in node.meta:
        args, kwargs = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
        node.meta["flops"] = op_flops(node.target, args, kwargs, node.meta["val"])
    return int(node.meta["flops"])


def work_share(rules: Sequence[AxisRule], mesh: Sequence[int]) -> float:
    """The share of the op's work that one rank does: each axis that cuts any tensor of the op divides it."""
    share = 1.0
    for rule, size in zip(rules, mesh, strict=True):
        if any(p is not None and shard_dim(p) is not None for p in (*rule.inputs, *rule.outputs)):
            share /= size
    return share


def op_seconds(
    costs: CostModel,
    node: fx.Node,
    operands: Sequence[Operand],
    rules: Sequence[AxisRule],
    operand_states: Sequence[State],
    result_states: Sequence[State | None],
) -> float:
    """Seconds of one op on one rank: its roofline and the collectives inside its lowering.

    No overlap of collectives and compute is assumed, with one exception: a lowering that works on one part while the
    next is on its way (`InnerCollective.beside_compute`) pays for what its own compute does not hide.
    operand_states: as the op sees its operands (after views).
    """
    mesh = costs.mesh
    reads = {(o.value, s): local_bytes(o.tensor, s, mesh) for o, s in zip(operands, operand_states, strict=True)}
    made = [(t, s) for t, s in zip(result_metas(node), result_states, strict=True) if t is not None and s is not None]
    moved = sum(reads.values()) + sum(local_bytes(t, s, mesh) for t, s in made)
    flops = op_flops_of(node) * work_share(rules, mesh)
    compute_s = costs.op_s(op_class(node.target), flops, moved, compute_dtype(node, operands), op_name(node.target))
    seconds = compute_s
    seconds += costs.views_s(sum(len(o.views) for o in operands))
    beside_s = 0.0
    for axis, rule in enumerate(rules):
        for inner in rule.collectives:
            nbytes = _inner_bytes(node, operands, operand_states, result_states, inner, mesh)
            inner_s = costs.copy_s(nbytes) if inner.kind == "copy" else costs.collective_s(inner.kind, nbytes, axis)
            if inner.beside_compute:
                beside_s += inner.times * inner_s
            else:
                seconds += inner.times * inner_s
    return seconds + costs.shown_s(beside_s, compute_s * (1 - 1 / _parts(rules, mesh)))


def _parts(rules: Sequence[AxisRule], mesh: Sequence[int]) -> int:
    """Into how many parts an op's work is cut whose collectives run beside it; the last part has none to run beside."""
    sizes = [n for n, rule in zip(mesh, rules, strict=True) if any(c.beside_compute for c in rule.collectives)]
    return math.prod(sizes)


def inner_steps(
    node: fx.Node,
    operands: Sequence[Operand],
    rules: Sequence[AxisRule],
    operand_states: Sequence[State],
    result_states: Sequence[State | None],
    mesh: Sequence[int],
) -> list[tuple[str, int, int]]:
    """(kind, mesh axis, bytes) of the collectives inside the lowering of an op."""
    return [
        (inner.kind, axis, _inner_bytes(node, operands, operand_states, result_states, inner, mesh))
        for axis, rule in enumerate(rules)
        for inner in rule.collectives
        if inner.kind != "copy"
        for _ in range(inner.times)
    ]


def compute_dtype(node: fx.Node, operands: Sequence[Operand]) -> str:
    """The dtype whose peak rate applies, e.g. "bfloat16", cached on the node."""
    if "compute_dtype" not in node.meta:
        tensors = [o.tensor for o in operands if o.tensor.is_floating_point()]
        tensors = tensors or [t for t in result_metas(node) if t is not None]
        node.meta["compute_dtype"] = str(tensors[0].dtype).removeprefix("torch.") if tensors else "float32"
    return str(node.meta["compute_dtype"])


def _inner_bytes(
    node: fx.Node,
    operands: Sequence[Operand],
    operand_states: Sequence[State],
    result_states: Sequence[State | None],
    inner: InnerCollective,
    mesh: Sequence[int],
) -> int:
    side, index = inner.tensor
    tensor = operands[index].tensor if side == "in" else result_metas(node)[index]
    state = operand_states[index] if side == "in" else result_states[index]
    assert tensor is not None and state is not None
    local = list(local_shape(tensor.shape, state, mesh) or ())
    for dim in inner.reduced_dims:
        local[dim] = 1
    return math.ceil(inner.copies * math.prod(local) * tensor.element_size())
