"""`axis_rules`: everything known about an op on one mesh axis, from all sources, checked and memoised."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from autopar._torch_compat import OpOverload, dtensor_rules, static_size
from autopar.grouping import grouped_nodes
from autopar.placements import PARTIAL, REPLICATE, Fold, Placement, local_shape
from autopar.rules.admitted import is_admitted
from autopar.rules.custom import CUSTOM, elementwise
from autopar.rules.folds import folded_rules
from autopar.rules.groups import grouped_rules
from autopar.rules.linear import linear_rules, shared_bias_rules
from autopar.rules.random import random_rules
from autopar.rules.ring import ONE_AXIS, dealt_ring, ring_rules
from autopar.rules.schema import OpCall, bind, is_random, op_call, operands, results
from autopar.rules.shared_heads import shared_head_rules
from autopar.rules.types import AxisRule, RuleSet

_MEMO: dict[Hashable, RuleSet] = {}


def axis_rules(node: fx.Node, axis_size: int, fold: Fold | None = None) -> RuleSet:
    """All legal ways to run a call_function node of a joint graph on a mesh axis of `axis_size` ranks.

    fold: of dims that may be cut run by run, or dealt out, too.

    The replicated rule is always there, and first. Every other rule divides evenly.
    `RuleSet.known` is False where nothing but replication is known. Rules depend on the
    op, its arguments and its operands' shapes, strides and dtypes only, and are memoised
    by these.
    """
    if not isinstance(node.target, OpOverload):
        return RuleSet((_replicated(len(operands(node)), results(node)),), known=False)
    grouped = node in grouped_nodes(node.graph)
    key = (node.target, axis_size, fold, grouped, tuple((name, _signature(value)) for name, value in bind(node)))
    if key not in _MEMO:
        found = _find(op_call(node), axis_size, grouped)
        _MEMO[key] = found if fold is None else _with_folds(found, op_call(node), axis_size, fold, grouped)
    return _MEMO[key]


def compatible(rules: Sequence[AxisRule], mesh: Sequence[int]) -> bool:
    """Whether rules of one op, one per mesh axis, can be lowered together.

    That is: at most one lowering besides "local", none on two axes that goes around one, and no unit
    (`AxisRule.units`) cut through.
    """
    lowerings = [rule.lowering for rule in rules if rule.lowering != "local"]
    if len(set(lowerings)) > 1 or (len(lowerings) > 1 and lowerings[0] in ONE_AXIS):
        return False
    parts = math.prod(size for rule, size in zip(rules, mesh, strict=True) if rule.units)
    return all(rule.units % parts == 0 for rule in rules)


def _signature(value: Any) -> Hashable:
    """What rules may depend on in an argument. Types are part of it, as 1 == 1.0 == True."""
    if isinstance(value, fx.Node):
        meta = value.meta.get("val")
        if isinstance(meta, torch.Tensor):
            return (tuple(map(static_size, meta.shape)), tuple(map(static_size, meta.stride())), meta.dtype)
        return _signature(meta)
    if isinstance(value, (list, tuple)):
        return tuple(_signature(v) for v in value)
    if isinstance(value, torch.SymInt):
        return _signature(static_size(value))
    return (type(value), value if isinstance(value, Hashable) else id(value))


def _replicated(inputs: int, outputs: Sequence[torch.Tensor | None]) -> AxisRule:
    return AxisRule((REPLICATE,) * inputs, tuple(None if t is None else REPLICATE for t in outputs))


def _find(call: OpCall, axis_size: int, grouped: bool) -> RuleSet:
    replicated = _replicated(len(call.inputs), call.outputs)
    if is_random(call):
        parts = random_rules(call) if axis_size > 1 else []
        return RuleSet((replicated, *(r for r in parts if _is_legal(r, call, axis_size))), known=True)
    if call.op._schema.is_mutable or not all(_is_static(t) for t in (*call.inputs, *call.outputs)):
        return RuleSet((replicated,), known=False)
    own = _sharded(call, axis_size)
    if own is None:
        return RuleSet((replicated,), known=False)
    rules = dict.fromkeys([replicated])
    if axis_size > 1:
        summing = (*linear_rules(call), *shared_bias_rules(call), *ring_rules(call, axis_size))
        summing = (*summing, *shared_head_rules(call, axis_size))
        rules |= dict.fromkeys(r for r in (*own, *summing) if _is_legal(r, call, axis_size, grouped))
        if grouped:
            more = grouped_rules(call, tuple(rules))
            rules |= dict.fromkeys(r for r in more if _is_legal(r, call, axis_size, grouped))
    return RuleSet(tuple(rules), known=True)


def _with_folds(found: RuleSet, call: OpCall, axis_size: int, fold: Fold, grouped: bool) -> RuleSet:
    if axis_size == 1 or not found.known or is_random(call):
        return found
    rules = [*folded_rules(call, found.rules, fold), *(dealt_ring(call, axis_size) if fold.dealt else ())]
    more = (r for r in rules if _is_legal(r, call, axis_size, grouped))
    return RuleSet(tuple(dict.fromkeys((*found.rules, *more))), known=True)


def _is_static(tensor: torch.Tensor | None) -> bool:
    return tensor is None or None not in map(static_size, tensor.shape)


def _sharded(call: OpCall, axis_size: int) -> Iterable[AxisRule] | None:
    """Rules without summands among the operands (but those of CUSTOM); None if nothing is known."""
    if call.name in CUSTOM:
        return CUSTOM[call.name](call)
    if is_admitted(call.op):
        found = dtensor_rules(call.op, call.args, call.kwargs, call.outputs, axis_size)
        if found is not None:
            return [_from_dtensor(*rule) for rule in found if not {PARTIAL, "avg"} & set(rule[0])]
    if torch.Tag.pointwise in call.op.tags:
        return elementwise(call)
    return None


def _from_dtensor(taken: tuple[Placement, ...], made: tuple[Placement | None, ...]) -> AxisRule:
    """A rule of DTensor's; an average over the axis is a sum of local means, each divided by the axis' size."""
    if "avg" in made:
        return AxisRule(taken, tuple(PARTIAL if p == "avg" else p for p in made), "mean_partial")
    return AxisRule(taken, made)


def _is_legal(rule: AxisRule, call: OpCall, axis_size: int, counts: bool = False) -> bool:
    """Every result that exists has a placement, shards divide, and summands are floating (or `counts`)."""
    pairs = [*zip(call.inputs, rule.inputs, strict=True), *zip(call.outputs, rule.outputs, strict=True)]
    for tensor, placement in pairs:
        if tensor is None or placement is None:
            if tensor is not None or placement is not None:
                return False
            continue
        if placement == PARTIAL and not (tensor.is_floating_point() or counts):
            return False
        if local_shape(tensor.shape, (placement,), (axis_size,)) is None:
            return False
    return rule.units % axis_size == 0
