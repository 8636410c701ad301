"""`Search`: the cheapest solution that fits, with proof; and the least memory that any needs.

First with memory free: if that optimum fits it is the answer (its bound holds in any case). Then with memory limited,
starting from what was learnt. A caller that holds a solution of another problem for the same work (another mesh) gives
its cost as a cutoff, and what memory was worth there: most often a first ascent at these prices then shows that there
is nothing to find here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from autopar.solver.ascent import Ascent, DualAscent
from autopar.solver.check import check_problem
from autopar.solver.clock import Clock
from autopar.solver.evaluate import Evaluation, InvalidSolution, complete, evaluate, fits_host
from autopar.solver.least import TINY, find_least, grace_s, infeasible, least_conceivable
from autopar.solver.lifetimes import lifetimes, value_kinds
from autopar.solver.linear import Floats
from autopar.solver.narrow import CLOSE, Allowed, Narrowed, Narrowing, Restricted, both, nearest, shared, within
from autopar.solver.problem import (
    NO_ASSIGNMENT,
    InfeasibleProblem,
    Least,
    NothingCheaper,
    Problem,
    Solution,
    SolveResult,
    asks_for_less,
    mean_conversions,
    sum_of_choices,
)
from autopar.solver.stage import COST_UNITS, Accept, Relaxation, SolverError, Stage, worthwhile

NO_LIMIT = 1 << 60  # bytes that no problem needs
SMALL = 1500  # choices in all: below, the model with all of them is solved directly
LOOK_SWEEPS = 8
FIRST_WIDENING, WIDENING_GROWTH = 0.02, 4.0  # of the bound: choices let in as long as nothing is found
EXCEEDED = 1e-6  # memory beyond the limit, in model units, that is more than rounding
FINE_GAP = 1e-4  # the least that turns of LP and ascent aim at


@dataclass(frozen=True)
class Progress:
    """What `solve` knows at a moment. incumbent_s is None before the first solution."""

    stage: str
    elapsed_s: float
    incumbent_s: float | None
    bound_s: float


class Search:
    """The search on one problem, in two steps: a look, and the rest if the look says that it is worth it.

    bound_s: what is proven so far. best: the cheapest solution so far that fits. least: the leanest, once it was asked
    for, which may come from a search on the same problem with another capacity.
    """

    def __init__(
        self, problem: Problem, *, gap: float, progress: Callable[[Progress], None] | None = None, whole: bool = False
    ) -> None:
        check_problem(problem)
        self._whole = whole
        self.problem, self.gap, self.progress = problem, gap, progress
        self.clock, self.cutoff_s = Clock(None), math.inf
        self.lives = lifetimes(problem)
        self._kinds = value_kinds(problem, self.lives)
        self.bound_s = sum_of_choices(problem, min)
        self.cost_scale = COST_UNITS / (
            self.bound_s or sum_of_choices(problem, max) or mean_conversions(problem) or 1.0
        )
        self.best: tuple[Solution, Evaluation] | None = None
        self.least: Least | None = None
        self.free_peak = 1
        self.groups: set[tuple[int, int, int]] = set()
        self.allowed: Allowed = []
        self.turns: Narrowed | None = None
        self._seen: Ascent | None = None
        self._graph: DualAscent | None = None
        self._explain = True
        self.stats: dict[str, float] = {}
        self.limit = problem.capacity_bytes
        self.hopeless = self.limit is not None and least_conceivable(problem, self.lives) > self.limit  # plainly
        if self.limit is None and asks_for_less(problem):
            self.limit = NO_LIMIT  # where memory is free the model knows nothing of running again, nor of offload
        self._narrowed = self.narrowing(self.limit, excess=False)

    # -- the whole ---------------------------------------------------------------

    @property
    def paid_s(self) -> Floats | None:
        """What the last LP says memory is worth, see `SolveResult.paid_s`; None before there was one that fits."""
        if self.turns is None or self.turns.paid is None or self.turns.relaxed.excess > EXCEEDED:
            return None
        return self.turns.paid / self.cost_scale

    def look(
        self,
        paid_s: Floats | None = None,
        *,
        time_limit_s: float | None = None,
        cutoff_s: float = math.inf,
        gap: float | None = None,
    ) -> None:
        """Raise the bound as far as that is cheap. paid_s: prices of memory that are known from elsewhere; without
        them, or if the problem is small, they are found too. cutoff_s: see `solve`. gap: how close these prices have
        to be, if not as close as the solution. Raises InfeasibleProblem if no assignment has its conversions."""
        self.cutoff_s = cutoff_s
        self._set_clock(time_limit_s)
        if self.hopeless:
            return
        if self.limit is not None and paid_s is not None and not self.is_small():
            there = self._narrowed.ascend(paid_s * self.cost_scale, self._enough(), sweeps=LOOK_SWEEPS)
            self._raise_bound(there.bound)
            if self._seen is None or there.bound > self._seen.bound:
                self.allowed, self._seen = nearest(there), there
            self._report("at known prices of memory")
            return
        self.look_around()
        self._narrowed = self.narrowing(self.limit, excess=False)  # in units that fit what was seen
        if not self._closed() and not self.is_small():
            self._narrowed.close = max(self._narrowed.close, CLOSE * (gap or 0.0))
            self._take_turns()

    def finish(
        self, *, cutoff_s: float = math.inf, time_limit_s: float | None = None, explained: bool = True
    ) -> SolveResult:
        """The cheapest solution; see `solve`. After `look`. explained: whether an InfeasibleProblem that is proven
        says what it would take, which needs a search of its own (`explain` does it later)."""
        self.cutoff_s, self._explain = cutoff_s, explained
        self._set_clock(time_limit_s)
        if self.hopeless:
            self._raise_infeasible(proven=True)
        if not self._closed():
            self._solve(self.limit)
        return self._result()

    def leanest(self) -> Least:
        """The leanest solution, as far as it is known to a search that takes as long as it takes: some seconds."""
        if self.least is None:
            self.least = find_least(self)
        return self.least

    def explained(self) -> InfeasibleProblem:
        """The one without explanation that was raised when all was proven, with it."""
        return infeasible(self, self.leanest(), proven=True)

    def _set_clock(self, limit_s: float | None) -> None:
        self.clock = self._narrowed.clock = Clock(limit_s)

    def look_around(self) -> None:
        """With memory free, relaxed and rounded: a bound, choices to start with, and perhaps the answer."""
        narrowing = self.narrowing(None, excess=False, clock=Clock(None))
        if self.is_small():
            self.allowed = self.everything()
        else:
            free = narrowing.ascend(np.zeros(len(self.problem.ops) + 1))
            self._raise_bound(free.bound)
            self.allowed = nearest(free)
        now = self._relax_always_feasible(narrowing)
        if self.is_small():
            self._raise_bound(now.relaxed.bound)
        self.offer_rounded(now.stage, now.relaxed, self._accepting(now.restricted))
        self._note("free", now.stage)
        self._report("memory free, relaxed")

    def is_small(self) -> bool:
        return self._whole or self.size() <= SMALL

    def size(self) -> int:
        return sum(len(op.choices) for op in self.problem.ops)

    def everything(self) -> Allowed:
        return shared(lambda choices: np.ones(len(choices), dtype=bool), [op.choices for op in self.problem.ops])

    def _relax_always_feasible(self, narrowing: Narrowing) -> Narrowed:
        """The LP with memory free, which can only be infeasible for want of conversions (or of choices)."""
        now = narrowing.limited(self.allowed)
        if now.relaxed.status == "infeasible" and not self.is_whole():
            self.allowed = self.everything()
            now = narrowing.limited(self.allowed)
        if now.relaxed.status == "infeasible":
            now.stage.add_all_groups()
            now = replace(now, relaxed=now.stage.relax())
        if now.relaxed.status == "infeasible":
            raise InfeasibleProblem(NO_ASSIGNMENT)
        return now

    # -- turns, then integers ------------------------------------------------------

    def _solve(self, limit: int | None) -> None:
        """The cheapest within `limit` (None: memory is free)."""
        narrowing = self._narrowed
        found = self.turns or self._take_turns()
        if found.relaxed.status == "optimal" and found.relaxed.excess > EXCEEDED and self.cutoff_s == math.inf:
            assert limit is not None
            before = list(self.allowed)
            self._check_feasible(limit)
            if any((a != b).any() for a, b in zip(before, self.allowed, strict=True)):  # it let choices in
                found = replace(narrowing.limited(self.allowed), priced=found.priced, bound=found.bound)
        if self._closed():
            return
        proven = self._search_in(found)
        self._raise_bound(proven if found.priced is None and self.is_whole() else min(proven, found.bound))
        self._report("in integers")
        if found.priced is not None and not self._closed():
            found = narrowing.tightened(found, self._enough())
            self._raise_bound(min(proven, found.bound))
            self._report("bound tightened")
            self._widen(narrowing, found, proven)
        if self.best is None and self.cutoff_s == math.inf:
            self._find_first() if limit is None else self._find_any(limit)

    def _take_turns(self) -> Narrowed:
        self.turns = self._narrowed.run(self.allowed, enough=self._enough(), seen=self._seen)
        self._raise_bound(self.turns.bound)
        self._report("relaxed")
        return self.turns

    def is_whole(self) -> bool:
        return all(a.all() for a in self.allowed)

    def _widen(self, narrowing: Narrowing, found: Narrowed, proven: float) -> None:
        """Let in every choice that a solution better by more than the gap can use, and search again.

        proven: bound on the solutions that use the choices let in so far.
        """
        assert found.priced is not None
        low = found.priced.bound  # which margins count from; `found.bound` is at least 0, also where this is not
        slack = FIRST_WIDENING * found.bound
        while not self._closed() and not self.clock.out():
            if self._cutoff() < np.inf:
                slack = max(worthwhile(self._cutoff(), self.gap) - low, 0.0)
            wider = within(found.priced, slack)
            if not all((a | ~b).all() for a, b in zip(self.allowed, wider, strict=True)):
                self.allowed[:] = both(self.allowed, wider)
                proven = self._search_in(narrowing.limited(self.allowed))
            self._raise_bound(min(proven, math.inf if self.is_whole() else low + slack))
            self._report("in integers")
            if self.is_whole() or slack >= worthwhile(self._cutoff(), self.gap) - low:
                break
            slack = slack * WIDENING_GROWTH if slack < found.bound else math.inf

    def _search_in(self, found: Narrowed) -> float:
        """Search among the choices of `found`; a bound, in model units, on the solutions that use no others."""
        self._note("limited", found.stage)
        if found.relaxed.result is None:
            return math.inf if found.relaxed.status == "infeasible" else found.relaxed.bound
        accept = self._accepting(found.restricted)
        self.offer_rounded(found.stage, found.relaxed, accept)
        bound = found.relaxed.bound
        if found.relaxed.status == "optimal":
            bound = found.stage.search(found.relaxed, accept, self._cutoff(), self.gap)
        self._note("limited", found.stage)
        return bound

    def _accepting(self, restricted: Restricted) -> Accept:
        def accept(solution: Solution, found: Evaluation) -> None:
            self.accept(restricted.original(solution), found)

        return accept

    def narrowing(self, limit: int | None, *, excess: bool, clock: Clock | None = None) -> Narrowing:
        # a limit far below what any solution takes would make the numbers of memory rows explode
        reference = max(float(limit), self.free_peak / 16) if limit else float(self.free_peak)
        return Narrowing(
            self.problem,
            self.lives,
            clock or self.clock,
            self.cost_scale,
            limit,
            reference,
            excess=excess,
            groups=self.groups,
            whole=self.is_small(),
            gap=FINE_GAP if excess else max(self.gap, FINE_GAP),
            graph=self._graph_of_all,
            kinds=self._kinds,
        )

    def _graph_of_all(self) -> DualAscent:
        if self._graph is None:
            self._graph = DualAscent(self.problem, self.lives, self._kinds)
        return self._graph

    def _check_feasible(self, limit: int) -> None:
        """Raise if not even fractional solutions stay within the limit."""
        if self.narrowing(limit, excess=True, clock=self._grace()).run(self.allowed).bound > EXCEEDED:
            self._raise_infeasible(proven=True)

    def _find_any(self, limit: int) -> None:
        """No solution so far: the leanest may fit; else minimise the excess over the limit, with some grace; raise if
        none is found."""
        least = self.leanest()
        self.accept(least.solution, evaluate(self.problem, least.solution, self.lives))
        if self.best is not None:
            return
        found = self.narrowing(limit, excess=True, clock=self._grace()).run(self.allowed)
        if found.bound <= EXCEEDED and found.relaxed.result is not None:
            accept = self._accepting(found.restricted)
            self.offer_rounded(found.stage, found.relaxed, accept)
            if self.best is None:
                found.stage.search(found.relaxed, accept, np.inf, 0.0)
        if self.best is None:
            self._raise_infeasible(proven=found.bound > EXCEEDED)

    def _find_first(self) -> None:
        """No solution in time, though memory is free: rounding asked for what cannot be. Take the time for one."""
        self.allowed = self.everything()
        found = self.narrowing(None, excess=False, clock=Clock(None)).limited(self.allowed)
        found.stage.search(found.relaxed, self._accepting(found.restricted), np.inf, 1.0)

    def _raise_infeasible(self, *, proven: bool) -> None:
        """Nothing fits; or, not proven, nothing was found."""
        if self._explain or not proven:
            raise infeasible(self, self.leanest(), proven=proven)
        raise InfeasibleProblem(f"no solution fits in {self.problem.capacity_bytes} bytes")

    def _grace(self) -> Clock:
        """Time to find out whether anything fits at all: what is left, but not next to nothing. Tiny problems
        are always settled."""
        left = self.clock.left_s()
        return Clock(None if left is None or self.size() <= TINY else max(left, grace_s(self)))

    # -- incumbent and bound -----------------------------------------------------

    def accept(self, solution: Solution, found: Evaluation) -> None:
        self.free_peak = max(self.free_peak, found.peak_bytes)
        limit = self.problem.capacity_bytes
        if limit is not None and found.peak_bytes > limit:
            return
        if self.best is None or found.cost_s < self.best[1].cost_s:
            self.best = (solution, found)

    def offer_rounded(self, stage: Stage, relaxed: Relaxation, accept: Accept) -> None:
        """The likeliest choices of a relaxation, with everything kept, as the LP says, or all run again."""
        assert relaxed.result is not None
        choices, recomputed, copies, away = stage.form.decisions(relaxed.result.values)
        everything = [o for o, op in enumerate(self.problem.ops) if op.recompute_time is not None]
        all_away = [v for v, value in enumerate(self.problem.values) if value.offload_s is not None]
        ways = [(again, gone) for gone in (away, all_away) for again in ([], recomputed, everything)]
        for again, gone in dict.fromkeys((tuple(again), tuple(gone)) for again, gone in ways):
            try:
                solution = complete(stage.problem, choices, again, copies, stage.lives, gone)
                found = evaluate(stage.problem, solution, stage.lives)
            except InvalidSolution:  # rounding asked for an impossible conversion
                continue
            if fits_host(stage.problem, found):
                accept(solution, found)

    def _cutoff(self) -> float:
        """What a solution must cost less than to be of interest, in model units."""
        best_s = math.inf if self.best is None else self.best[1].cost_s
        return min(best_s, self.cutoff_s) * self.cost_scale

    def _enough(self) -> float:
        """A bound, in model units, that leaves nothing of interest."""
        return self._cutoff() * (1 - self.gap)

    def _raise_bound(self, bound: float) -> None:
        self.bound_s = max(self.bound_s, bound / self.cost_scale)

    def _closed(self) -> bool:
        return self.bound_s * self.cost_scale >= self._enough() or (
            self.best is not None and self._gap(self.best[1].cost_s) <= self.gap
        )

    def _gap(self, cost_s: float) -> float:
        gap = max(0.0, cost_s - self.bound_s) / cost_s if cost_s > 0 else 0.0
        return gap if gap > 1e-9 else 0.0  # what is left below is rounding

    def _report(self, stage: str) -> None:
        if self.progress is not None:
            best = None if self.best is None else self.best[1].cost_s
            self.progress(Progress(stage, self.clock.elapsed_s(), best, self.bound_s))

    def _note(self, name: str, stage: Stage) -> None:
        self.stats |= {f"{name}_{key}": value for key, value in stage.stats.items()}
        self.stats[f"{name}_columns"] = float(len(stage.model.cost))
        self.stats[f"{name}_rows"] = float(len(stage.model.row_low))

    def _result(self) -> SolveResult:
        if self.best is None or self.best[1].cost_s >= self.cutoff_s:
            raise NothingCheaper(self.bound_s)
        solution, found = self.best
        again = evaluate(self.problem, solution, self.lives)
        limit = self.problem.capacity_bytes
        if again.cost_s != found.cost_s or (limit is not None and again.peak_bytes > limit):
            raise SolverError("the solution does not fit or not cost what was found: report this problem")
        bound = min(self.bound_s, found.cost_s)
        gap = self._gap(found.cost_s)
        status = "optimal" if gap <= self.gap else "feasible"
        peak = (found.peak_bytes, found.peak_time)
        seconds = self.clock.elapsed_s()
        return SolveResult(solution, status, found.cost_s, bound, gap, *peak, seconds, self.stats, self.paid_s)
