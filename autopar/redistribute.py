"""Moving a tensor from one state to another: which steps, in which order, at what cost.

A step changes the placement on one mesh axis with one collective (or a local slice):

    P    -> R      all_reduce              P    -> S(d)   reduce_scatter
    S(d) -> R      all_gather              S(d) -> S(e)   all_to_all
    R    -> S(d)   slice (local)           S(d) -> D(d)   permute: two messages of half a rank's part each

Where several axes cut one dim, the later axis cuts inside the earlier one, so an axis
may only start or stop cutting a dim while no later axis cuts it. The cheapest sequence
of steps is a shortest path over states (Dijkstra), so that, for instance, the
hierarchical all-reduce (reduce-scatter inside a node, all-reduce across nodes on the
shard, all-gather inside) is found where it pays, not coded.

The planner prices a path and the code generator emits the same path.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from autopar.placements import (
    PARTIAL,
    REPLICATE,
    Fold,
    Placement,
    State,
    cut_alike,
    dealt,
    experts,
    in_groups,
    is_dealt,
    local_shape,
    own,
    runs_left,
    shard,
    shard_dim,
    shard_runs,
)


@dataclass(frozen=True)
class Step:
    """One change of placement on one axis. `nbytes`: the larger of a rank's tensor before and after."""

    kind: str  # "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "permute", "slice"
    axis: int
    before: State
    after: State
    nbytes: int
    parts: int  # size of the axis

    @property
    def from_front(self) -> bool:
        """Whether what is gathered lies as it arrives: blocks along dim 0, from end to end."""
        return self.before[self.axis] == shard(0)

    @property
    def to_front(self) -> bool:
        """Whether what is scattered lies as it leaves."""
        return self.after[self.axis] == shard(0)

    @property
    def reorders(self) -> int:
        """How often chunks that are dealt out are put in order, or out of it, besides other copies of the layout.

        What is cut along its first dim is copied for nothing else: that one copy is `from_front` or `to_front`.
        """
        ends = [p for p in (self.before[self.axis], self.after[self.axis]) if is_dealt(p)]
        return sum(self.kind == "all_to_all" or shard_dim(p) != 0 or shard_runs(p) > 1 for p in ends)

    @property
    def folded_dim(self) -> int | None:
        """The dim that the step cuts, or puts together, run by run (see `Fold`), if any."""
        both = (self.before[self.axis], self.after[self.axis])
        return next((shard_dim(p) for p in both if shard_runs(p) > 1), None)

    def runs_of(self, state: State, mesh: Sequence[int]) -> int:
        """How many runs of that dim a rank holds in `state`, one of the two."""
        both = (self.before[self.axis], self.after[self.axis])
        return runs_left(next(p for p in both if shard_runs(p) > 1), state, mesh)

    @property
    def source_dim(self) -> int | None:
        """The dim that is cut before the step, if any."""
        return shard_dim(self.before[self.axis])

    @property
    def target_dim(self) -> int | None:
        """The dim that is cut after the step, if any."""
        return shard_dim(self.after[self.axis])


class StepCosts(Protocol):
    """What pricing a step takes (an `autopar.cost.CostModel` is one)."""

    def collective_s(self, kind: str, nbytes: float, axis: int) -> float: ...

    def copy_s(self, nbytes: float) -> float: ...

    @property
    def bucket_bytes(self) -> int: ...

    @property
    def scatters_by_exchange(self) -> bool: ...

    @property
    def exposed_gradient_share(self) -> float: ...


_KINDS = {
    ("P", "R"): "all_reduce",
    ("P", "S"): "reduce_scatter",
    ("S", "R"): "all_gather",
    ("S", "S"): "all_to_all",
    ("R", "S"): "slice",
}


# Steps for tensors of which only the run knows how many rows a rank has.
_OF_ANY_LENGTH = ("all_reduce", "all_gather", "slice")


def step_kind(before: Placement, after: Placement) -> str | None:
    """The operation that turns one placement into another on one axis, None if there is none."""
    if before == after:
        return None
    kind = _KINDS.get((before[0].replace("D", "S"), after[0].replace("D", "S")))
    return "permute" if kind == "all_to_all" and cut_alike(before, after) else kind


def enumerate_states(
    shape: Sequence[int], mesh: Sequence[int], *, partial: bool, fold: Fold | None = None, grouped: bool = False
) -> tuple[State, ...]:
    """All states that a tensor of this shape can be in on this mesh; "P" only if `partial`; fold: see `Fold`; by its
    groups only if `grouped` (then along dim 0, not together with equal parts of it, and by owners on one axis)."""
    options: list[Placement] = [REPLICATE, *(shard(d) for d in range(len(shape))), *([PARTIAL] if partial else [])]
    if fold is not None and fold.dealt:
        options += [dealt(d) for d, size in enumerate(shape) if size == fold.run and fold.runs > 1]
        options += [dealt(d, fold.runs) for d, size in enumerate(shape) if fold.holds(size)]
    elif fold is not None:
        options += [shard(d, fold.runs) for d, size in enumerate(shape) if fold.holds(size)]
    if grouped and shape:
        options += [own(0), experts(0)]
    states = itertools.product(options, repeat=len(mesh))
    return tuple(state for state in states if _is_state(state) and local_shape(shape, state, mesh) is not None)


def _is_state(state: State) -> bool:
    grouped = [p for p in state if in_groups(p)]
    equal = any(p[0] in "SD" and shard_dim(p) == 0 for p in state)
    return not grouped or (not equal and grouped.count(experts(0)) <= 1)


def step_s(step: Step, costs: StepCosts) -> float:
    """Seconds of one step, with the copies that lay out the data around the collective.

    Collectives move contiguous blocks of dim 0; any other dim takes a local transposition
    before (reduce_scatter), after (all_gather) or on both sides (all_to_all).
    """
    if step.kind == "slice":
        return costs.copy_s(step.nbytes / step.parts)
    if step.kind == "permute":
        return 2 * costs.collective_s("permute", step.nbytes / 2, step.axis) + 3 * costs.copy_s(step.nbytes)
    seconds = costs.collective_s(step.kind, step.nbytes, step.axis) + step.reorders * costs.copy_s(step.nbytes)
    if step.kind == "all_to_all":
        seconds += 2 * costs.copy_s(step.nbytes)
    elif step.kind != "all_reduce" and not (step.from_front if step.kind == "all_gather" else step.to_front):
        seconds += costs.copy_s(step.nbytes)
    return seconds


@dataclass(frozen=True)
class Conversions:
    """All conversions between the states of tensors of one shape and element size.

    cost_s: [n, n] seconds, inf where impossible (nothing becomes partial again).
    state_bytes: bytes a rank holds in each state.
    workspace_bytes: [n, n] memory that a conversion takes beside its source and its target (layout copies, steps
        in between).
    """

    states: tuple[State, ...]
    state_bytes: tuple[int, ...]
    cost_s: np.ndarray = field(repr=False)
    workspace_bytes: np.ndarray = field(repr=False)
    _previous: tuple[tuple[Step | None, ...], ...] = field(repr=False)

    def path(self, source: State, target: State) -> tuple[Step, ...]:
        """The cheapest sequence of steps from one state to another; empty if they are equal."""
        index = {state: i for i, state in enumerate(self.states)}
        row, at, steps = self._previous[index[source]], index[target], []
        while self.states[at] != source:
            step = row[at]
            if step is None:
                raise ValueError(f"no way from {source} to {target}")
            steps.append(step)
            at = index[step.before]
        return tuple(reversed(steps))


def conversions(
    shape: Sequence[int],
    itemsize: int,
    mesh: Sequence[int],
    states: Sequence[State],
    costs: StepCosts,
    *,
    summable: bool = True,
) -> Conversions:
    """Cheapest conversions between all `states` of a tensor (all-pairs Dijkstra).

    summable: whether summands may be summed; if not, they stay summands.
    """
    states = tuple(states)
    nbytes = tuple(math.prod(local_shape(shape, s, mesh) or ()) * itemsize for s in states)
    steps = [[x for x in _steps_from(s, states, nbytes, mesh) if summable or not _sums(x[1])] for s in states]
    arcs = [[(target, step, step_s(step, costs)) for target, step in out] for out in steps]
    cost = np.full((len(states), len(states)), np.inf)
    previous = []
    for source in range(len(states)):
        distance, row = _dijkstra(source, arcs)
        cost[source] = distance
        previous.append(tuple(row))
    made = Conversions(states, nbytes, cost, np.zeros((0, 0), dtype=np.int64), tuple(previous))
    return replace(made, workspace_bytes=_workspace(made, costs.scatters_by_exchange))


def _sums(step: Step) -> bool:
    return step.kind in ("all_reduce", "reduce_scatter")


def _workspace(made: Conversions, by_exchange: bool) -> np.ndarray:
    """Beyond the result itself, the most bytes alive on the way from each state to each other."""
    found = np.zeros(made.cost_s.shape, dtype=np.int64)
    size = dict(zip(made.states, made.state_bytes, strict=True))
    index = {state: i for i, state in enumerate(made.states)}
    for i, row in enumerate(made._previous):
        most = {i: 0}  # bytes alive at once on the way to a state, what it starts from not counted
        for target in range(len(row)):
            way, at = [], target
            while at not in most and (step := row[at]) is not None:
                way.append((at, step))
                at = index[step.before]
            for here, step in reversed(way):
                before = index[step.before]
                between = 0 if before == i else made.state_bytes[before]
                most[here] = max(most[before], between + _step_peak(step, size, by_exchange))
            found[i, target] = max(0, most.get(target, 0) - made.state_bytes[target])
    return found


def _step_peak(step: Step, size: dict[State, int], by_exchange: bool) -> int:
    """Bytes that a step allocates, as the code generator writes it: layout copies, received blocks, result."""
    before, after = size[step.before], size[step.after]
    if step.kind == "reduce_scatter" and by_exchange:
        return before + max(before if not step.to_front else 0, after)
    if step.kind == "reduce_scatter":
        return after + (before if not step.to_front else 0)
    if step.kind == "all_gather":
        return after + (after if not step.from_front else 0)
    if step.kind == "all_to_all":
        return after + max(before if not step.to_front else 0, after if not step.from_front else 0)
    return 2 * after if step.kind == "permute" else after


def _steps_from(
    state: State, states: tuple[State, ...], nbytes: tuple[int, ...], mesh: Sequence[int]
) -> Iterator[tuple[int, Step]]:
    here = states.index(state)
    for index, other in enumerate(states):
        changed = [a for a in range(len(state)) if state[a] != other[a]]
        if len(changed) != 1:
            continue
        axis = changed[0]
        kind = step_kind(state[axis], other[axis])
        touched = (state[axis], other[axis])
        if kind is None or any(cut_alike(p, q) for p in state[axis + 1 :] for q in touched):
            continue
        if kind not in _OF_ANY_LENGTH and any(p[0] == "E" for p in (*state, *other)):
            continue
        step = Step(kind, axis, state, other, max(nbytes[here], nbytes[index]), mesh[axis])
        if step.folded_dim is None or all(_between_runs(s, step, mesh) for s in (state, other)):
            yield index, step


def _between_runs(state: State, step: Step, mesh: Sequence[int]) -> bool:
    """Whether a state cuts the dim that a step sees as runs from end to end between runs only."""
    runs = max(shard_runs(step.before[step.axis]), shard_runs(step.after[step.axis]))
    cuts = (n for p, n in zip(state, mesh, strict=True) if shard_dim(p) == step.folded_dim and shard_runs(p) == 1)
    return runs % math.prod(cuts) == 0


def _dijkstra(source: int, arcs: list[list[tuple[int, Step, float]]]) -> tuple[list[float], list[Step | None]]:
    distance = [math.inf] * len(arcs)
    previous: list[Step | None] = [None] * len(arcs)
    distance[source] = 0.0
    queue = [(0.0, source)]
    while queue:
        d, at = heapq.heappop(queue)
        if d > distance[at]:
            continue
        for target, step, seconds in arcs[at]:
            if d + seconds < distance[target]:
                distance[target] = d + seconds
                previous[target] = step
                heapq.heappush(queue, (d + seconds, target))
    return distance, previous


@dataclass(frozen=True)
class BucketedCosts:
    """Costs of conversions that travel in buckets: a message pays its share, by bytes, of a full bucket."""

    costs: StepCosts

    @property
    def bucket_bytes(self) -> int:
        """A full bucket."""
        return self.costs.bucket_bytes

    @property
    def scatters_by_exchange(self) -> bool:
        """The same as without buckets."""
        return self.costs.scatters_by_exchange

    @property
    def exposed_gradient_share(self) -> float:
        """Of the time of a reduction, what the backward pass does not hide."""
        return self.costs.exposed_gradient_share

    def collective_s(self, kind: str, nbytes: float, axis: int) -> float:
        """Seconds of this message's share of a full bucket; for reductions, which nothing waits for before the
        optimizer, those that are exposed."""
        full = max(float(self.bucket_bytes), nbytes)
        exposed = self.exposed_gradient_share if kind in ("all_reduce", "reduce_scatter") else 1.0
        return exposed * self.costs.collective_s(kind, full, axis) * nbytes / full

    def copy_s(self, nbytes: float) -> float:
        """Copies are not shared."""
        return self.costs.copy_s(nbytes)


class ConversionTables:
    """The conversions of every kind of tensor on one mesh, computed once per shape and element size.

    Values that are nothing but gradients are reduced in buckets (`BucketedCosts`).
    """

    def __init__(self, mesh: Sequence[int], costs: StepCosts, fold: Fold | None = None) -> None:
        self.mesh, self.fold = tuple(mesh), fold
        self._costs = {False: costs, True: BucketedCosts(costs)}
        self._tables: dict[tuple[tuple[int, ...], int, bool, bool, bool, bool], Conversions] = {}

    def costs(self, *, bucketed: bool = False) -> StepCosts:
        """What prices a step of a conversion."""
        return self._costs[bucketed]

    def of(
        self, tensor: torch.Tensor, *, bucketed: bool = False, summable: bool = True, grouped: bool = False
    ) -> Conversions:
        """The table for tensors like this one; those of floating point may also be sums in pieces.

        summable: False for what must be widened before its summands are summed (`dataflow.narrow_gradients`).
        grouped: what may be rows in groups, or count them (then integers are summed as well).
        """
        shape, itemsize, partial = tensor.shape, tensor.element_size(), tensor.is_floating_point() or grouped
        key = (tuple(shape), itemsize, partial, bucketed, summable, grouped)
        if key not in self._tables:
            states = enumerate_states(shape, self.mesh, partial=partial, fold=self.fold, grouped=grouped)
            priced = self._costs[bucketed]
            self._tables[key] = conversions(shape, itemsize, self.mesh, states, priced, summable=summable)
        return self._tables[key]
