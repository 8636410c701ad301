"""How tensor parallelism cuts a model, as Megatron-LM does it: found by the integer program, not written by hand.

On one axis of two ranks the planning problem is solved with one restriction: a value may only be converted by summing
its summands. What is cut once can then only become whole again through a product that contracts the cut dim, so the
cheapest solution is a column-parallel product followed by a row-parallel one (Shoeybi et al. 2019), the vocabulary of
embedding and loss cut likewise. The states do not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx

from autopar.cluster import ClusterSpec, LinkSpec
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.dataflow import Dataflow, View, ViewMaps, is_backward, result_metas, value_name
from autopar.placements import Placement, shard, shard_dim
from autopar.plan_types import Decisions
from autopar.rules import operands
from autopar.rules.schema import normalized, op_call
from autopar.rules.types import AxisRule
from autopar.sharding import OpOption, Pins, ShardingProblem, build_problem
from autopar.solver import Choice, Problem, solve
from autopar.trace import Trace

_RANKS = 2
_RESHAPES = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default}
_PIECES = {
    torch.ops.aten.split.Tensor,
    torch.ops.aten.split_with_sizes.default,
    torch.ops.aten.slice.Tensor,
}
_LARGE = 4  # times as many rows as an activation or a matrix: a table of that size is cut though it costs a collective
_TIME_LIMIT_S = 20.0
_GAP = 1e-3


@dataclass(frozen=True)
class TensorAxis:
    """Placements on the tensor axis.

    rules: per op. made: per base value. params: per parameter name, as stored.
    taken: per op, the placement in which it takes the base value of each operand.
    """

    rules: dict[str, AxisRule]
    made: dict[str, Placement]
    params: dict[str, Placement]
    taken: dict[str, tuple[Placement, ...]]


def tensor_axis(trace: Trace, cluster: ClusterSpec, tokens: int) -> TensorAxis:
    """Solve for the placements. tokens: rows of an activation of one sequence."""
    pair = replace(cluster, nodes=1, devices_per_node=_RANKS, links=(_inner_link(cluster),))
    costs = CostModel(pair, (_RANKS,))
    large = _large_tables(trace, tokens)
    pins = Pins(allow_param=lambda p, state: p.fqn not in large or state != ("R",))
    views = MergedDims(costs.mesh)
    stated = build_problem(trace, costs, OptimizerSpec("none"), pins=pins, views=views)
    stated = _with_packed_cats(stated, trace, views)
    found = solve(_only_sums(stated, trace), time_limit_s=_TIME_LIMIT_S, gap=_GAP, whole=True)
    return _read(trace, stated.decisions(found.solution))


class MergedDims(ViewMaps):
    """Views that also pass a cut of an inner one of several dims that they merge, as Megatron's layers do.

    [batch, heads, ...] cut by heads is, merged to [batch x heads, ...], no even cut of a dim in rank order. Only the
    share that a rank holds matters here, and which dim is meant is certain: the batch of the trace is odd.

    Several matrices packed into one (query, key and value) are cut each for itself: the columns of the packed one can
    be stored in any order, so a piece of what is cut is cut.
    """

    def _map(self, view: View, size: int) -> dict[Placement, Placement]:
        mapping = dict(super()._map(view, size))
        if view.node.target in _PIECES:
            mapping.setdefault(piece := shard(dim_of(view.node)), piece)
        if view.node.target in _RESHAPES:
            tensor = result_metas(view.node)[view.index]
            assert tensor is not None
            source = resolve_shape(view.node)
            for inner, outer in merged_dims(source, tuple(tensor.shape)):
                cut = [d for d in inner if source[d] % size == 0]
                made = [d for d in outer if tensor.shape[d] % size == 0]
                if cut and made:
                    mapping.setdefault(shard(cut[0]), shard(made[0]))
        return mapping


def resolve_shape(view: fx.Node) -> tuple[int, ...]:
    """The shape of what a view looks at."""
    tensor = operands(view)[0].meta["val"]
    return tuple(tensor.shape)


def merged_dims(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The groups of dims that a reshape merges or splits: dims before, dims after, of equal product."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        left, right = [i], [j]
        while math.prod(before[d] for d in left) != math.prod(after[d] for d in right):
            if math.prod(before[d] for d in left) < math.prod(after[d] for d in right):
                left.append(left[-1] + 1)
            else:
                right.append(right[-1] + 1)
            if left[-1] >= len(before) or right[-1] >= len(after):
                return groups
        groups.append((left, right))
        i, j = left[-1] + 1, right[-1] + 1
    return groups


def _inner_link(cluster: ClusterSpec) -> LinkSpec:
    # of a cluster of single devices: what tensor parallelism would do does not depend on the figures
    return cluster.links[0] if cluster.links else LinkSpec("assumed", 100e9, 0.8, 5e-6)


def _large_tables(trace: Trace, tokens: int) -> set[str]:
    """Lookup tables that nobody would keep whole on every rank.

    One of positions has a row for each token and is kept whole. One of the batch's own ids, of a vocabulary, is cut for
    a long sequence too, if it is as large as that beside the matrices of a layer.
    """
    flow, params = Dataflow.of(trace), {p.node: p for p in trace.params}
    ids = {i.node for i in trace.inputs if i.batch_dim is not None}
    large = set()
    for node in flow.ops:
        if node.target is not torch.ops.aten.embedding.default:
            continue
        table, index = (operand.node.name for operand in flow.operands_of[node][:2])
        if table in params:
            rows, width = params[table].shape
            if rows > _LARGE * (min(tokens, width) if index in ids else tokens):
                large.add(params[table].fqn)
    return large


def dim_of(node: fx.Node) -> int:
    """The dim along which a node takes pieces or puts them together."""
    call = op_call(node)
    return normalized(int(call.arg("dim", 0)), call.inputs[0].dim())


def _with_packed_cats(stated: ShardingProblem, trace: Trace, views: MergedDims) -> ShardingProblem:
    """The gradients of pieces, put together again: cut pieces make a cut whole, see `MergedDims`."""
    flow, ops, options = Dataflow.of(trace), list(stated.problem.ops), dict(stated.options)
    for node in flow.ops:
        if node.target is not torch.ops.aten.cat.default or not is_backward(node):
            continue
        at, cut = stated.op_index[node.name], (shard(dim_of(node)),)
        op, base = ops[at], []
        for operand, value in zip(flow.operands_of[node], op.operands, strict=True):
            base.append(views.preimages(operand, stated.states[value]).get(cut))
        made = stated.states[op.results[0]]
        if None in base or cut not in made:
            continue
        states = tuple(state for state in base if state is not None)
        uses = tuple(stated.states[v].index(s) for v, s in zip(op.operands, states, strict=True))
        choice = Choice(min(c.cost_s for c in op.choices) / _RANKS, uses, (made.index(cut),))
        rule = AxisRule(cut * len(base), cut)
        ops[at] = replace(op, choices=(*op.choices, choice))
        options[node.name] = (*options[node.name], OpOption((rule,), (cut,) * len(base), states, (cut,)))
    return replace(stated, problem=replace(stated.problem, ops=tuple(ops)), options=options)


def _side_values(trace: Trace) -> set[str]:
    """Forward values that no parameter has a part in: masks, positions. Any rank can make its piece of them."""
    flow, params = Dataflow.of(trace), {p.node for p in trace.params}
    learnt: set[str] = set(params)
    side: set[str] = set()
    for node in flow.ops:
        names = {value_name(node, i) for i in range(len(result_metas(node)))}
        if is_backward(node) or any(o.value in learnt for o in flow.operands_of[node]):
            learnt |= names
        else:
            side |= names
    return side


def _only_sums(stated: ShardingProblem, trace: Trace) -> Problem:
    values = []
    side = {stated.value_index[name] for name in _side_values(trace)}
    for index, (value, states) in enumerate(zip(stated.problem.values, stated.states, strict=True)):
        if index in side:
            values.append(value)
            continue
        allowed = np.full(value.convert_s.shape, np.inf)
        np.fill_diagonal(allowed, 0.0)
        if ("P",) in states and ("R",) in states:
            source, target = states.index(("P",)), states.index(("R",))
            allowed[source, target] = value.convert_s[source, target]
        values.append(replace(value, convert_s=allowed))
    return replace(stated.problem, values=tuple(values))


def _read(trace: Trace, decisions: Decisions) -> TensorAxis:
    flow = Dataflow.of(trace)
    made: dict[str, Placement] = {}
    for param in trace.params:
        made[param.node] = decisions.params[param.fqn][0]
    for node in flow.ops:
        for index, state in enumerate(decisions.nodes[node.name].result_states):
            if state is not None:
                made[node.name if index == 0 else f"{node.name}#{index}"] = state[0]
    return TensorAxis(
        rules={n.name: decisions.nodes[n.name].rules[0] for n in flow.ops},
        made=made,
        params={fqn: state[0] for fqn, state in decisions.params.items()},
        taken={n.name: tuple(s[0] for s in decisions.nodes[n.name].operand_states) for n in flow.ops},
    )


def is_cut(placement: Placement | None) -> bool:
    """Whether a rank holds a part only."""
    return placement is not None and shard_dim(placement) is not None
