"""Price a solution from scratch: its seconds and its memory time line.

Written from `solver.lifetimes` alone, without the ILP's matrices: the two must agree, and
`solve` checks after every run that they do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from autopar.solver.lifetimes import Span, ValueLife, lifetimes
from autopar.solver.problem import Problem, Solution

CATEGORIES = ("constant", "persistent", "originals", "kept", "fetched", "recomputed", "copies", "workspace")


class InvalidSolution(ValueError):
    """The solution breaks a rule of the problem; the message says which and where."""


@dataclass(frozen=True)
class Evaluation:
    """What a solution costs.

    cost_s: total seconds; `compute_s`, `recompute_s`, `convert_s` (in the pass that makes a
        value), `convert_backward_s` (of forward values, in the backward pass) and `offload_s` (to the host and back)
        are its parts.
    memory_bytes: [T] bytes alive at each time; `memory_by_category` are its parts:
        constant; persistent; originals (in the pass that makes them); kept (originals and
        copies from forward to backward); fetched (from the host); recomputed; copies (converted); workspace.
    peak_bytes / peak_time: the first highest point.
    host_bytes: of the host's memory.
    """

    cost_s: float
    compute_s: float
    recompute_s: float
    convert_s: float
    convert_backward_s: float
    memory_bytes: npt.NDArray[np.int64] = field(repr=False, compare=False)
    memory_by_category: dict[str, npt.NDArray[np.int64]] = field(repr=False, compare=False)
    peak_bytes: int
    peak_time: int
    offload_s: float = 0.0
    host_bytes: int = 0


def fits_host(problem: Problem, found: Evaluation) -> bool:
    """Whether the host can hold what is put there."""
    return problem.host_capacity_bytes is None or found.host_bytes <= problem.host_capacity_bytes


def evaluate(problem: Problem, solution: Solution, lives: tuple[ValueLife, ...] | None = None) -> Evaluation:
    """Price `solution` (capacities are not checked: compare `peak_bytes`, ask `fits_host`). Raises InvalidSolution."""
    return _Pricing(problem, solution, lives or lifetimes(problem)).run()


def complete(
    problem: Problem,
    choices: tuple[int, ...],
    recomputed: Iterable[int],
    kept_copies: Iterable[tuple[int, int]],
    lives: tuple[ValueLife, ...] | None = None,
    offloaded: Iterable[int] = (),
) -> Solution:
    """The solution with these decisions that keeps no more than it must (and runs again what has to).

    Copies that the forward pass does not make, or that the backward pass does not want,
    are not kept. What must be kept then follows: `kept` costs memory and nothing else. Of that, what is to be
    offloaded, and can be in the state in which it is made, or must not stay, is.
    """
    forced = {o for o, op in enumerate(problem.ops) if op.must_rerun}
    again, wished, away = frozenset(recomputed) | forced, frozenset(kept_copies), frozenset(offloaded)
    kept: set[int] = set()
    gone: set[int] = set()
    copies: set[tuple[int, int]] = set()
    for v, life in enumerate(lives or lifetimes(problem)):
        made = problem.ops[life.made_by].choices[choices[life.made_by]].makes[life.result]
        value = problem.values[v]
        there = {problem.ops[u.op].choices[choices[u.op]].uses[u.slot] for u in life.own_uses} - {made}
        leaves = not value.may_keep or (v in away and value.offload_s is not None and value.offload_s[made] < np.inf)
        for use in life.later_uses:
            if use.rerun and use.op not in again:
                continue
            wanted = problem.ops[use.op].choices[choices[use.op]].uses[use.slot]
            if wanted in there and (v, wanted) in wished and value.keeps_copy(wanted):
                copies.add((v, wanted))
            elif life.needs_keeping and (use.early or life.made_by not in again):
                (gone if leaves else kept).add(v)
    return Solution(choices, again, frozenset(kept), frozenset(copies), frozenset(gone))


class _Pricing:
    def __init__(self, problem: Problem, solution: Solution, lives: tuple[ValueLife, ...]) -> None:
        self.problem, self.solution, self.lives = problem, solution, lives
        self.times = len(problem.ops)
        self.steps = {name: [0] * (self.times + 1) for name in CATEGORIES}  # up at the first time, down after the last
        self.copies: dict[int, set[int]] = {}
        for v, state in solution.kept_copies:
            self.copies.setdefault(v, set()).add(state)
        self.own_s = self.later_s = self.offload_s = 0.0
        self.host_bytes = 0

    def run(self) -> Evaluation:
        self._check_decisions()
        ops, solution = self.problem.ops, self.solution
        picked = [op.choices[c] for op, c in zip(ops, solution.choices, strict=True)]
        always = (0, self.times - 1) if self.times else None
        self._alive("constant", always, self.problem.constant_bytes)
        for o, choice in enumerate(picked):
            self._alive("persistent", always, choice.persistent_bytes)
            self._alive("workspace", (o, o), choice.workspace_bytes)
            self.host_bytes += choice.host_bytes
        for o in sorted(solution.recomputed):
            at = ops[o].recompute_time
            assert at is not None
            self._alive("workspace", (at, at), picked[o].workspace_bytes)
        for v in range(len(self.problem.values)):
            self._price_value(v)
        compute_s = sum(choice.cost_s for choice in picked)
        recompute_s = sum(picked[o].cost_s for o in sorted(solution.recomputed))
        lines = {name: np.cumsum(np.array(steps, dtype=np.int64))[:-1] for name, steps in self.steps.items()}
        memory = np.zeros(self.times, dtype=np.int64)
        for line in lines.values():
            memory += line
        peak_time = int(np.argmax(memory)) if self.times else 0
        peak = int(memory[peak_time]) if self.times else self.problem.constant_bytes
        cost_s = compute_s + recompute_s + self.own_s + self.later_s + self.offload_s
        parts = (compute_s, recompute_s, self.own_s, self.later_s)
        away = (self.offload_s, self.host_bytes)
        return Evaluation(cost_s, *parts, memory, lines, peak, peak_time, *away)

    def _check_decisions(self) -> None:
        ops, solution = self.problem.ops, self.solution
        if len(solution.choices) != len(ops):
            raise InvalidSolution(f"{len(solution.choices)} choices for {len(ops)} ops")
        for op, choice in zip(ops, solution.choices, strict=True):
            if not 0 <= choice < len(op.choices):
                raise InvalidSolution(f"op {op.name!r} has no choice {choice}")
            if op.tied_to is not None and solution.choices[op.tied_to] != choice:
                raise InvalidSolution(f"op {op.name!r} must take the choice of op {ops[op.tied_to].name!r}")
        for o, op in enumerate(ops):
            twin = op.twin_of
            if twin is not None and solution.choices[twin] != solution.choices[o]:
                raise InvalidSolution(f"op {op.name!r} must take the choice of its twin {ops[twin].name!r}")
            if twin is not None and (twin in solution.recomputed) != (o in solution.recomputed):
                raise InvalidSolution(f"op {op.name!r} must run again if and only if its twin {ops[twin].name!r} does")
        for o in solution.recomputed:
            if not 0 <= o < len(ops) or ops[o].recompute_time is None:
                raise InvalidSolution(f"op {o} is recomputed but may not run twice")
        for o, op in enumerate(ops):
            if op.must_rerun and o not in solution.recomputed:
                raise InvalidSolution(f"op {op.name!r} must run again")
        stay = solution.kept | {v for v, _ in solution.kept_copies}
        for v in stay | solution.offloaded:
            if not 0 <= v < len(self.problem.values) or not self.lives[v].forward:
                raise InvalidSolution(f"value {v} is kept but is not a value of the forward pass")
            if v in stay and not self.problem.values[v].may_keep:
                raise InvalidSolution(f"value {self.problem.values[v].name!r} is kept but must not be")
        for v, state in solution.kept_copies:
            if not self.problem.values[v].keeps_copy(state):
                raise InvalidSolution(f"a copy of value {self.problem.values[v].name!r} is kept but must not be")
        for v in solution.offloaded & solution.kept:
            raise InvalidSolution(f"value {self.problem.values[v].name!r} is both kept and offloaded: decide")

    def _wanted(self, op: int, slot: int) -> int:
        return self.problem.ops[op].choices[self.solution.choices[op]].uses[slot]

    def _price_value(self, v: int) -> None:
        life, value, solution = self.lives[v], self.problem.values[v], self.solution
        made = self.problem.ops[life.made_by].choices[solution.choices[life.made_by]].makes[life.result]
        size = value.state_bytes
        self._alive("originals", life.base, size[made])
        if v in solution.kept:
            self._alive("kept", life.kept, size[made])
        if v in solution.offloaded:
            self._offload(v, made)
        if life.made_by in solution.recomputed:
            self._alive("recomputed", life.rerun, size[made])
        own = self._targets(v, made, [(u.op, u.slot, u.alias) for u in life.own_uses])
        for state, counted in own.items():
            self.own_s += self._conversion_s(v, made, state)
            if counted:
                self._alive("copies", life.own_copy, value.copy_bytes(made, state))
        copies = self.copies.get(v, set())
        for state in copies:
            if state not in own:
                raise InvalidSolution(f"value {value.name!r} keeps a copy in state {state} that forward never makes")
            self._alive("kept", life.kept_copy, size[state])
        self._price_later(v, made, copies)

    def _offload(self, v: int, made: int) -> None:
        value, life = self.problem.values[v], self.lives[v]
        if value.offload_s is None or not np.isfinite(value.offload_s[made]) or not life.needs_keeping:
            raise InvalidSolution(f"value {value.name!r} cannot be offloaded in state {made}")
        self.offload_s += value.offload_s[made]
        self.host_bytes += value.state_bytes[made]
        self._alive("fetched", life.fetched, value.state_bytes[made])

    def _price_later(self, v: int, made: int, copies: set[int]) -> None:
        life, solution = self.lives[v], self.solution
        happening = [u for u in life.later_uses if not u.rerun or u.op in solution.recomputed]
        for use in happening:
            if self._wanted(use.op, use.slot) in copies or not life.needs_keeping:
                continue
            if v in solution.kept or v in solution.offloaded:
                continue
            if use.early or life.made_by not in solution.recomputed:
                name, user = self.problem.values[v].name, self.problem.ops[use.op].name
                raise InvalidSolution(f"value {name!r} is not there when op {user!r} wants it at time {use.time}")
        wanted = self._targets(v, made, [(u.op, u.slot, u.alias) for u in happening])
        for state, counted in wanted.items():
            if state not in copies:
                self.later_s += self._conversion_s(v, made, state)
                if counted:
                    self._alive("copies", life.later_copy, self.problem.values[v].copy_bytes(made, state))

    def _targets(self, v: int, made: int, uses: list[tuple[int, int, bool]]) -> dict[int, bool]:
        """Wanted states other than the made one, and whether their copies count apart from results."""
        targets: dict[int, bool] = {}
        for op, slot, alias in uses:
            state = self._wanted(op, slot)
            if state == made:
                continue
            targets[state] = targets.get(state, False) or not alias
            if alias:
                result = self.problem.ops[op].results[0]
                makes = self.problem.ops[op].choices[self.solution.choices[op]].makes[0]
                if not self.problem.values[result].always_available:
                    self._alive("originals", (op, op), self.problem.values[result].state_bytes[makes])
                self._alive("copies", (op, op), self.problem.values[v].workspace_bytes(made, state))
        return targets

    def _conversion_s(self, v: int, source: int, target: int) -> float:
        seconds = float(self.problem.values[v].convert_s[source, target])
        if not np.isfinite(seconds):
            raise InvalidSolution(f"value {self.problem.values[v].name!r} cannot go from state {source} to {target}")
        return seconds

    def _alive(self, category: str, span: Span | None, nbytes: int) -> None:
        if span is not None:
            self.steps[category][span[0]] += nbytes
            self.steps[category][span[1] + 1] -= nbytes
