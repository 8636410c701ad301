"""The planning problem, free of torch: what may be chosen and what it costs.

Ops stand in execution order; the position of an op is its *time*. The first
`forward_ops` of them are the forward pass, the rest the backward pass. Each op picks
one *choice*: what it costs, in which state it takes each operand and in which state it
makes each result. States are indices, local to each value.

A value made in one state and wanted in another is *converted*, at a cost. A converted
copy is made once per pass and shared by all uses that want it in that pass. A value of
the forward pass that is needed in the backward pass (by a backward op, or by a forward
op that is run again) is available there in one of these ways:

  * its original is kept from forward to backward (memory), or
  * its original is *offloaded*: copied to the host after its last use in the forward pass and fetched
    back before the first one in the backward pass (time on the link to the host, memory of the host), or
  * its op is run again in the backward pass (time), at `Op.recompute_time`, with the
    same choice, taking its operands as uses of the backward pass, or
  * a converted copy that the forward pass made is kept (memory), or
  * a converted copy is made (again) in the backward pass (time) from the original,
    which must then be available.

Values with `always_available` (parameters, buffers, inputs) need none of this: their
original is there at all times.

Nothing runs beside a copy to or from the host, as nothing runs beside a collective: its seconds add to
all others. The host holds everything that was offloaded at the same time, between the passes, and what
choices put there for good (`Choice.host_bytes`: optimizer state); together at most `host_capacity_bytes`.

Memory at a time t is the sum of all bytes alive at t and must not exceed
`capacity_bytes`. Lifetimes (both ends included; see `solver.lifetimes`) are static, on
the safe side: they cover every use that may happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

NO_ASSIGNMENT = (
    "no assignment of choices has all its conversions possible, all that is wanted there, and the host's memory kept: "
    "give some op another choice"
)


@dataclass(frozen=True)
class Choice:
    """One way to run an op.

    cost_s: seconds on a rank, conversions of operands not included.
    uses: per operand, the state index in which it is taken.
    makes: per result, the state index in which it is made.
    workspace_bytes: extra memory while the op runs.
    persistent_bytes: memory held at all times because of this choice (parameter and
        optimizer state).
    host_bytes: memory of the host held at all times because of this choice. What the way there and back costs
        is part of cost_s.
    label: for people.
    """

    cost_s: float
    uses: tuple[int, ...]
    makes: tuple[int, ...]
    workspace_bytes: int = 0
    persistent_bytes: int = 0
    host_bytes: int = 0
    label: str = ""


@dataclass(frozen=True)
class Op:
    """One node of the problem.

    operands / results: indices into `Problem.values`. A value may stand in `operands`
        more than once.
    recompute_time: None if the op may not run twice; else the time (an index of a
        backward op) right before which it runs again if the solver says so. Only for
        forward ops.
    must_rerun: with a recompute_time: it does run again, whatever that costs.
    tied_to: index of an op that must take the choice of the same index (the gradient
        of a parameter is made in the parameter's own state).
    twin_of: index of an earlier op that does the same in another, identical layer: it must take the
        choice of the same index, and run again if and only if that one does.
    results_start_next: the results' storage is that of the (converted) operand, so
        they are counted from the next time on.
    """

    name: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    choices: tuple[Choice, ...]
    recompute_time: int | None = None
    tied_to: int | None = None
    results_start_next: bool = False
    must_rerun: bool = False
    twin_of: int | None = None


@dataclass(frozen=True)
class Value:
    """One tensor.

    state_bytes: bytes a rank holds, per state.
    convert_s: [n, n] seconds from state i to state j; 0 on the diagonal, inf where impossible.
    convert_workspace_bytes: [n, n] what a conversion takes beside its source and its target while it happens
        (layout copies, steps in between); None for nothing. It is counted as long as the converted copy lives.
    always_available: see the module docstring. Its memory is counted in its op's
        `persistent_bytes`, not here.
    live_out: it must still be there after the last op (gradients).
    offload_s: seconds, per state, to copy it to the host and back; inf where that is impossible, None if it always is.
    may_keep: False if neither it nor copies of it may stay on the device from forward to backward.
    fleeting: states in which no converted copy of it may: where one is wanted in the backward pass it is made again.
    """

    name: str
    state_bytes: tuple[int, ...]
    convert_s: np.ndarray = field(repr=False, compare=False)
    always_available: bool = False
    live_out: bool = False
    convert_workspace_bytes: np.ndarray | None = field(default=None, repr=False, compare=False)
    offload_s: tuple[float, ...] | None = None
    may_keep: bool = True
    fleeting: frozenset[int] = frozenset()

    def keeps_copy(self, state: int) -> bool:
        """Whether a copy in this state may stay on the device from forward to backward."""
        return self.may_keep and state not in self.fleeting

    def workspace_bytes(self, source: int, target: int) -> int:
        """Bytes beside source and target while the one is converted into the other."""
        return 0 if self.convert_workspace_bytes is None else int(self.convert_workspace_bytes[source, target])

    def copy_bytes(self, source: int, target: int) -> int:
        """Bytes that count while a converted copy lives."""
        return self.state_bytes[target] + self.workspace_bytes(source, target)


@dataclass(frozen=True)
class Problem:
    """A whole planning problem. Every value is the result of exactly one op."""

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    forward_ops: int
    capacity_bytes: int | None = None
    constant_bytes: int = 0
    host_capacity_bytes: int | None = None


@dataclass(frozen=True)
class Solution:
    """A decision for every open question of a problem.

    choices: per op, the index of its choice.
    recomputed: ops that run again in the backward pass.
    kept: values whose original is kept from forward to backward.
    kept_copies: (value, state) of forward conversions kept for the backward pass.
    offloaded: values whose original waits for the backward pass on the host.
    All other conversions follow: in each pass, one per (value, state) that is wanted and not there.
    """

    choices: tuple[int, ...]
    recomputed: frozenset[int]
    kept: frozenset[int]
    kept_copies: frozenset[tuple[int, int]]
    offloaded: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SolveResult:
    """What the solver found, and what it proved.

    status: "optimal" (gap within tolerance, proven) or "feasible" (a time limit stopped the proof).
    objective_s / bound_s: cost of the solution, and a proven lower bound on any solution.
    gap: (objective - bound) / objective, as proven by the solver, never assumed.
    peak_bytes / peak_time: highest point of the memory time line.
    paid_s: [times + 1] what the LP says a byte costs, in seconds, from time 0 up to t: the shadow prices of memory,
        summed up. None where memory was no matter.
    """

    solution: Solution
    status: str
    objective_s: float
    bound_s: float
    gap: float
    peak_bytes: int
    peak_time: int
    solve_s: float
    stats: dict[str, float] = field(default_factory=dict)
    paid_s: np.ndarray | None = field(default=None, repr=False, compare=False)


class NothingCheaper(Exception):
    """No solution found that is cheaper than the cutoff. bound_s: proven, for any solution (inf: nothing fits)."""

    def __init__(self, bound_s: float) -> None:
        super().__init__(f"no solution costs less than {bound_s:.6g} s")
        self.bound_s = bound_s


@dataclass(frozen=True)
class Least:
    """The leanest solution that was found, whatever it costs: it needs `needed_bytes`, most of them at `peak_time`.

    bound_bytes: none needs less. bound_s: no solution is cheaper, however much memory there is.
    """

    needed_bytes: int
    bound_bytes: int
    peak_time: int
    solution: Solution
    bound_s: float


class InfeasibleProblem(Exception):
    """No solution fits. `least`: what it would take, if memory is what binds and it was asked."""

    def __init__(self, message: str, least: Least | None = None) -> None:
        super().__init__(message)
        self.least = least

    @property
    def needed_bytes(self) -> int | None:
        """The smallest capacity for which a solution was found."""
        return None if self.least is None else self.least.needed_bytes

    @property
    def bound_bytes(self) -> int | None:
        """What is proven of that."""
        return None if self.least is None else self.least.bound_bytes

    @property
    def peak_time(self) -> int | None:
        """When that solution needs most."""
        return None if self.least is None else self.least.peak_time


def sum_of_choices(problem: Problem, pick: Callable[[Iterable[float]], float]) -> float:
    """Seconds of all ops with their cheapest (min) or dearest (max) choices."""
    found: dict[int, float] = {}
    for op in problem.ops:
        if id(op.choices) not in found:  # identical layers share their choices
            found[id(op.choices)] = pick(c.cost_s for c in op.choices)
    return sum(found[id(op.choices)] for op in problem.ops)


def mean_conversions(problem: Problem) -> float:
    """Seconds of one conversion of every value, the mean of those that are possible."""
    return sum(v.convert_s[np.isfinite(v.convert_s)].mean() for v in problem.values if len(v.state_bytes))


def asks_for_less(problem: Problem) -> bool:
    """Whether it is fixed that something does not wait for the backward pass in memory, however much there is."""
    return any(op.must_rerun for op in problem.ops) or not all(value.may_keep for value in problem.values)
