"""Reads the familiar names (dp, tp, zero, sp, recompute) off a plan's decisions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from autopar.dataflow import Dataflow, is_backward, resolve, result_metas
from autopar.grouping import is_grouped_product
from autopar.opcost import op_flops_of
from autopar.pin_sequence import along_sequence, lead_of
from autopar.pins import weight_slots
from autopar.placements import shard_dim
from autopar.plan_types import Decisions
from autopar.rules import AxisRule, operands
from autopar.trace import Trace


def axis_roles(trace: Trace, decisions: Decisions, mesh: tuple[int, ...]) -> tuple[str, ...]:
    """Per mesh axis "tp" (weights used in parts), "dp" or "cp" (weights used whole, batch or sequences cut) or "none".

    By majority of the forward FLOPs of ops that use weights.
    """
    flow, lead = Dataflow.of(trace), lead_of(trace)
    votes: list[dict[str, float]] = [{"dp": 0.0, "cp": 0.0, "tp": 0.0, "none": 0.0} for _ in mesh]
    for node in flow.ops:
        slots = [] if is_backward(node) or is_grouped_product(node) else weight_slots(node, trace)
        if not slots:
            continue
        decision = decisions.nodes[node.name]
        for axis in range(len(mesh)):
            rule = decision.rules[axis]
            cut = any(shard_dim(p) is not None for p in (*rule.inputs, *(o for o in rule.outputs if o)))
            weight_cut = any(shard_dim(rule.inputs[s]) is not None for s in slots)
            role = "tp" if weight_cut else "cp" if cut and _cuts_sequence(node, rule, lead) else "dp" if cut else "none"
            votes[axis][role] += max(1, op_flops_of(node))
    return tuple(max(v, key=lambda role: v[role]) if sum(v.values()) else "none" for v in votes)


def _cuts_sequence(node: fx.Node, rule: AxisRule, lead: tuple[int, ...] | None) -> bool:
    pairs = zip(operands(node), rule.inputs, strict=True)
    return lead is not None and any(along_sequence(o.meta["val"], p, lead) for o, p in pairs)


def layout_keys(trace: Trace, decisions: Decisions, mesh: tuple[int, ...], roles: tuple[str, ...]) -> dict[str, Any]:
    """The layout in the keys of the command line."""
    degree = {role: math.prod(s for s, r in zip(mesh, roles, strict=True) if r == role) for role in ("dp", "cp", "tp")}
    recomputable = [d for n, d in decisions.nodes.items()]
    again = sum(d.recompute for d in recomputable)
    first = next((p for p in trace.params), None)
    return {
        **degree,
        "pp": 1,
        "ep": expert_degree(decisions, mesh),
        "vpp": 1,
        "micro_batch": max(1, _batch(trace) // max(1, degree["dp"])),
        "zero": _zero(trace, decisions, roles),
        "sp": _sequence_sharded(trace, decisions, roles),
        "recompute": "none" if not again else "selective",
        "schedule": "none",
        "grad_dtype": str(first.dtype).removeprefix("torch.") if first else None,
    }


def expert_degree(decisions: Decisions, mesh: tuple[int, ...]) -> int:
    """Over how many ranks experts are spread: by the axes that cut the groups of grouped products."""
    axes = {
        axis for d in decisions.nodes.values() for axis, rule in enumerate(d.rules) if rule.lowering == "expert_rows"
    }
    return math.prod(mesh[axis] for axis in axes)


def _batch(trace: Trace) -> int:
    return next((i.shape[0] for i in trace.inputs if i.batch_dim == 0), 1)


def _zero(trace: Trace, decisions: Decisions, roles: tuple[str, ...]) -> int:
    """0: most parameter bytes are whole on the data axes; 2: cut, gathered once; 3: also gathered in the backward."""
    axes = [a for a, role in enumerate(roles) if role in ("dp", "cp")]
    sizes = {p.fqn: math.prod(p.shape) for p in trace.params}
    cut = [p for p in trace.params if any(shard_dim(decisions.params[p.fqn][a]) is not None for a in axes)]
    if 2 * sum(sizes[p.fqn] for p in cut) <= sum(sizes.values()):
        return 0
    kept = {_parameter_behind(trace, value) for value, _ in decisions.kept_copies}
    return 2 if 2 * sum(sizes[p.fqn] for p in cut if p.node in kept) > sum(sizes[p.fqn] for p in cut) else 3


def _parameter_behind(trace: Trace, value: str) -> str:
    """The placeholder that a value is a cast of, or the value itself."""
    node = next((n for n in trace.graph_module.graph.nodes if n.name == value), None)
    while node is not None and node.target is torch.ops.aten._to_copy.default:
        node = resolve(operands(node)[0]).node
    return value if node is None else node.name


def _sequence_sharded(trace: Trace, decisions: Decisions, roles: tuple[str, ...]) -> bool:
    axes = [a for a, role in enumerate(roles) if role == "tp"]
    lead = next((tuple(i.shape[:2]) for i in trace.inputs if i.batch_dim == 0 and len(i.shape) > 1), None)
    for node in Dataflow.of(trace).ops:
        states = decisions.nodes[node.name].result_states
        for tensor, state in zip(result_metas(node), states, strict=True):
            if tensor is None or state is None or tensor.dim() != 3 or tuple(tensor.shape[:2]) != lead:
                continue
            if any(shard_dim(state[a]) == 1 for a in axes):
                return True
    return False
